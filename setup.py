"""
What setup.cfg cannot say: the address of the project, which whoever publishes a wheel gives as
PROJECT_URL, and a README whose links lead there from a package index.
"""

import os
import re
from pathlib import Path

from setuptools import setup

url = os.environ.get("PROJECT_URL", "").rstrip("/")
readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
if url:
    relative = r"\]\((?![a-z]+:|#)"
    readme = re.sub(rf"(!\[[^]]*{relative})", rf"\1{url}/raw/HEAD/", readme)
    readme = re.sub(relative, f"]({url}/blob/HEAD/", readme)
setup(
    project_urls={"Homepage": url} if url else {},
    long_description=readme,
    long_description_content_type="text/markdown",
)
