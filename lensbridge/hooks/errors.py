"""Every exception lensbridge raises on purpose.

::

    LensError
    ├── PointError (KeyError)             a name that leads to no hook point
    │   ├── UnknownPointError             no model has a point of that name
    │   └── AbsentPointError              other models have it, this one does not; says why
    ├── SelectionError (TypeError)        a filter that is neither name, list, glob nor predicate
    ├── HookValueError (TypeError)        a hook returned something that cannot stand in for its tensor
    ├── HookNotFiredError (RuntimeError)  a hook was set and the run went past without it
    ├── GradientError (RuntimeError)      a backward hook where no gradient can arrive
    ├── InputError (ValueError)           a bad prompt, token, mask or option
    ├── LayerRangeError (IndexError)      a layer this model does not have
    ├── NotFittedError (RuntimeError)     something that must be trained first, and was not
    └── ArchitectureError (ValueError)    a model whose parts could not be told apart

Each also derives from the builtin a caller would expect, so ``except KeyError`` around a lookup works.
"""

from __future__ import annotations


class LensError(Exception):
    """Base of all lensbridge errors."""


class PointError(LensError, KeyError):
    """A name that leads to no hook point of this model."""

    def __str__(self) -> str:
        # KeyError shows repr(message), which would escape quotes and line breaks.
        return Exception.__str__(self)


class UnknownPointError(PointError):
    """No point has this name; the message lists the nearest names."""


class AbsentPointError(PointError):
    """The name is canonical, but this model has no such place; the message says why."""


class SelectionError(LensError, TypeError):
    """A point filter of a kind that cannot select anything."""


class HookValueError(LensError, TypeError):
    """A hook function returned a value of the wrong type, shape, dtype or device."""


class HookNotFiredError(LensError, RuntimeError):
    """A hook was set, the run completed, and the hook's point was never reached."""


class GradientError(LensError, RuntimeError):
    """A backward hook was set on a tensor that no gradient can reach."""


class InputError(LensError, ValueError):
    """The input or an option of a call is not usable."""


class LayerRangeError(LensError, IndexError):
    """A layer index outside the model."""


class ArchitectureError(LensError, ValueError):
    """The model's parts could not be identified."""


class NotFittedError(LensError, RuntimeError):
    """Something that must be trained before it is used, and was not."""
