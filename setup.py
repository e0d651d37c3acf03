"""Build the optional accelerator; everything else is in pyproject.toml.

Without a C compiler or Python's headers the package is installed without it, and Python does the same work.
ZCPROTO_ACCELERATOR=off in the environment builds the wheel for all platforms, which is without it, too.
"""

import os
import sysconfig

from setuptools import Extension, setup

IS_WANTED = os.environ.get("ZCPROTO_ACCELERATOR") != "off"
IS_STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")  # a free-threaded Python has no stable ABI

accelerator = Extension(
    "zcproto._accelerator",
    ["zcproto/_accelerator.c"],
    define_macros=[("Py_LIMITED_API", "0x030b0000")] if IS_STABLE else [],
    py_limited_api=IS_STABLE,
    optional=True,
)

setup(
    ext_modules=[accelerator] if IS_WANTED else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if IS_WANTED and IS_STABLE else {},
)
