"""Expresser: genes as tokens, expression as values that pass through attention alone."""

from epivi.models.expresser.model import Expresser

__all__ = ["Expresser"]
