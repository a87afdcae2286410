"""What a driver or a worker does in Python.

Everything that runs once per task or per reference is the native core's (`ray._core`); this package holds what
people read and change: options and their checks, pickling, error texts, the worker's loop, the session.
Importing it must stay cheap: asyncio, cloudpickle, msgspec and traceback are imported by the functions that need them.
"""
