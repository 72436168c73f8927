"""The frame of a web page that stands alone: no script, nothing to load, light and dark as the reader has it."""

import html


def page(title: str, body: str, style: str = "", dark: str = "") -> str:
    """A whole page.

    Args:
        title: plain text; it is escaped here.
        body: HTML, below the title.
        style: CSS rules of this page's own.
        dark: CSS declarations of ``:root`` in the dark: colours that ``style`` sets for the light.
    """
    escaped = html.escape(title)
    dark_too = f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n" if dark else ""
    return _FRAME.format(title=escaped, style=f"{style}{dark_too}", body=body)


def hint(text: str) -> str:
    """Text as the value of an attribute in double quotes, its lines kept."""
    return html.escape(text, quote=True).replace("\n", "&#10;")


_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #ffffff; --ink: #16191d; --faint: #5c6670; --tint: 40 110 220; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14171a; --ink: #eef1f4; --faint: #a3adb8; --tint: 70 130 240; }}
}}
body {{ margin: 1.5rem; background: var(--paper); color: var(--ink); font: 14px/1.3 system-ui, sans-serif; }}
h1 {{ font-size: 1.1rem; font-weight: 600; }}
p {{ color: var(--faint); }}
div {{ overflow-x: auto; }}
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
