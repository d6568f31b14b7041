"""The command line: parse, call one function, print. Results go to stdout, progress and errors to stderr.

Reading order: app (every command), live (progress while a run trains), tables (results).
"""

from attnscope.cli.app import app

__all__ = ["app"]
