"""How does vision-language adaptation change the safety of a model? A companion to arXiv 2410.07571.

The package is thin: the notebooks argue, these rooms work. `design` of the rooms: a room imports only from floors
below it (see CONTRIBUTING.md); they hand things to each other through files, never through doors.
"""

__version__ = "0.1.0"
