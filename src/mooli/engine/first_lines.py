"""The first lines of a child process. Run as a file, never imported: `python first_lines.py MODULE WORDS...`.

`python -m MODULE` would put the current folder before all others, and a `json.py` there would run in the child. Here
nothing comes from anywhere but this package, Python's own folders and those of PYTHONPATH. The package is the one that
this file is of, wherever the parent had it from; MODULE's `main` does the rest, and finds WORDS as its own.
"""

import sys

if not getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
    del sys.path[0]  # the folder of this file, whose modules have names that others have too

import importlib.util
import os


def load_package() -> None:
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    spec = importlib.util.spec_from_file_location("mooli", os.path.join(folder, "__init__.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is no package")
    sys.modules["mooli"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


def run_module() -> "int | None":
    from mooli.entry import fill_standard_descriptors

    fill_standard_descriptors()
    del sys.argv[0]
    status: int | None = importlib.import_module(sys.argv[0]).main()
    return status


if __name__ == "__main__":
    load_package()
    sys.exit(run_module())
