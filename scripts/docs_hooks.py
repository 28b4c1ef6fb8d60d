# SPDX-License-Identifier: Apache-2.0
"""For mkdocs: what docstrings name as ``:func:`~package.name```, a page shows as the name alone."""

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod):<code>(?:~[\w.]*\.)?([\w.]+)</code>")


def on_page_content(html: str, **kwargs: Any) -> str:
    return _ROLE.sub(r"<code>\1</code>", html)
