"""Templates of the pages."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = PackageLoader("tfmq_exp.report.html", "templates")


def page_environment() -> Environment:
    """Templates that escape all text of files, and fail on an unknown name; the filter `source` is a file of theirs as it is."""
    environment = Environment(
        loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["source"] = lambda name: Markup(TEMPLATES.get_source(environment, name)[0])
    return environment
