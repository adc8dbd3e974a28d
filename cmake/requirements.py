"""Print the requirements that pyproject.toml names, one word each: its dependencies and the groups given.

`pip install --group` would do, but is newer than the pip of many hosts.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pip carries it
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
for group in sys.argv[1:]:
    listed = project["project"][group] if group == "dependencies" else project["dependency-groups"][group]
    print("\n".join(listed))
