"""``python -m ray`` is the command `ray`."""

from ray.scripts.scripts import main

if __name__ == "__main__":
    main()
