"""How the site is built: `python -m sphinx -W -n docs build/site` (docs/README.md says why it is Sphinx)."""

import gc
import sys
from pathlib import Path

gc.disable()  # every page stays alive, so each full collection would look through all of them, to find nothing

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import vcposim  # noqa: E402

project = "vcposim"
author = "The vcposim authors"
copyright = "the vcposim authors, Apache-2.0"
version = release = vcposim.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "sphinx_copybutton",
    "_hooks.mathml",
    "_hooks.docstrings",
    "_hooks.extension",
]
exclude_patterns = ["README.md", "_hooks/**", "**/.ipynb_checkpoints"]
default_role = "code"
nitpick_ignore_regex = [
    # types of other libraries: nothing is looked up on the network, so nothing is known of them
    (r"py:.*", r"(?!vcposim|llm_bridge).*"),
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_block", "attrs_inline"]
suppress_warnings = ["myst.header"]  # a log of findings may skip a level
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "notebooks")
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_mock_imports = ["trl", "verl", "tensordict", "peft"]  # the trainers exclude each other, the site needs neither
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": False}

html_theme = "pydata_sphinx_theme"
html_title = "vcposim"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "navbar_persistent": ["search-button-field"],
    "header_links_before_dropdown": 6,
    "navigation_depth": 3,
    "show_toc_level": 2,
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "start": [], "questions": [], "ask": []}
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
