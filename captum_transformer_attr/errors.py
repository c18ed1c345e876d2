"""The exceptions this package raises on purpose; each message names what is wrong and the way out."""


class TransformerAttributionError(Exception):
    """Base of every error this package raises on purpose."""


class UnsupportedOperationError(TransformerAttributionError):
    """The model computes something for which no rule is known, so no result is produced.

    The message names the operation, the path of the module that ran it and the ``register_rule`` call that would supply
    a rule.
    """


class UnsupportedModelError(TransformerAttributionError):
    """The model as a whole cannot be explained: no softmax attention, compiled, scripted, or not reproducible."""


class InputError(TransformerAttributionError, ValueError):
    """An argument of ``attribute`` (or of a command) cannot be used; the message names it."""


class TargetError(InputError, AssertionError, IndexError):
    """``target`` does not fit the model's output.

    Also an AssertionError and an IndexError, which Captum raises for bad targets.
    """
