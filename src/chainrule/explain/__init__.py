"""Accounts of plans as text and as data."""

from chainrule.explain.report import Explanation, explain

__all__ = ["Explanation", "explain"]
