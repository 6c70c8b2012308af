"""Configuration of the documentation: the guides as they were run, and a reference.

Read from here without a network: formulas are MathML, and nothing is loaded from elsewhere.
"""

import re
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import monge_sam_jax

project = "monge_sam_jax"
author = "The monge_sam_jax authors"
copyright = author  # noqa: A001 - the name is Sphinx's
release = monge_sam_jax.__version__

root_doc = "README"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = project
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"

nb_execution_mode = "off"  # outputs are kept with the notebooks, and the tests make them anew
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say what things are
napoleon_use_ivar = True
add_module_names = False
default_role = "py:obj"
python_maximum_signature_line_length = 88


def mathml(latex: str, display: str) -> str:
    """A formula that browsers draw by themselves."""
    known = latex.replace(r"\arg\max", r"\operatorname{argmax}").replace(
        r"\arg", r"\operatorname{arg}"
    )
    return latex2mathml.converter.convert(known, display=display)


def visit_math(self: Any, node: nodes.math) -> None:
    """Inline."""
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_displaymath(self: Any, node: nodes.math_block) -> None:
    """On lines of its own, which may be scrolled on a small screen."""
    formula = mathml(node.astext(), "block")
    self.body.append(f'<div class="math" style="overflow-x: auto">{formula}</div>')
    raise nodes.SkipNode


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """The first page's lists of links are the table of contents too."""
    if docname != root_doc:
        return
    for section in re.split(r"^## ", source[0], flags=re.M)[1:]:
        links = re.findall(r"^- \[(.*?)\]\(([\w/]+)\.(?:ipynb|md)\)", section, re.M)
        pages = [f"{name} <{page}>" for name, page in links]
        if pages:
            options = f":hidden:\n:caption: {section.splitlines()[0]}\n"
            source[0] += "\n```{toctree}\n" + "\n".join([options, *pages]) + "\n```\n"


def find_by_name(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, contnode: nodes.TextElement
) -> nodes.Node | None:
    """What docstrings name in backticks, by where the package offers it."""
    domain = env.domains["py"]
    target = node["reftarget"].partition("(")[0]
    ending = "." + target.removeprefix("monge_sam_jax.")
    names = [name for name in domain.objects if name.endswith(ending)]
    if node["reftype"] != "obj" or not names:
        return None
    name = min(names, key=lambda name: "nnx" in name)  # where NNX has its own, the other is meant
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


def link_names(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Links what guides name as code to the reference: the functions of the package's top."""
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext().partition("(")[0]
        if isinstance(literal.parent, nodes.reference | nodes.title) or not callable(
            getattr(monge_sam_jax, name, None)
        ):
            continue
        node = addnodes.pending_xref("", reftype="obj", reftarget=name, refdoc=docname)
        link = find_by_name(app, app.env, node, literal.deepcopy())
        if link is not None:
            literal.replace_self(link)


def shorten_defaults(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str | None, Any]:
    """Defaults that are functions or metrics, without addresses."""
    signature = re.sub(r"Metric\(init=.*?linear=True\)", "euclidean()", signature or "")
    return re.sub(r"<(?:function|class) '?([\w.]+).*?>", r"\1", signature) or None, returns


def leave_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples, which their docstrings list."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field") else None


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-signature", shorten_defaults)
    app.connect("autodoc-skip-member", leave_out)
    app.connect("doctree-resolved", link_names)
    app.connect("missing-reference", find_by_name)
