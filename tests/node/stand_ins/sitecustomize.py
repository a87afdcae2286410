"""Puts a stand-in for the native core into the interpreters that a test starts (see `fake_core`)."""

import os
import sys

if os.environ.get("RAY_TEST_FAKE_CORE") == "1":

    class _Finder:
        """Finds ``ray._core`` where the tests are."""

        def find_spec(self, name, path=None, target=None):
            if name != "ray._core":
                return None
            import importlib.util

            here = os.path.dirname(os.path.abspath(__file__))
            return importlib.util.spec_from_file_location(name, os.path.join(here, "fake_core.py"))

    sys.meta_path.insert(0, _Finder())
