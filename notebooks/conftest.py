"""What `make nbval` does not compare: notes to whoever runs a notebook (progress, "made by older code") go to stderr."""


def pytest_collectstart(collector):
    """nbval's own way to leave out kinds of output; committed notebooks hold none of these, see `vlsafe.notebooks.adopt`."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
