"""What the name of a torch function or tensor method says about it."""

from __future__ import annotations

from typing import Any

# Functions that read only shapes, dtypes or devices of their tensor arguments.
PASSIVE = frozenset(
    """shape size dim ndim numel nelement dtype device stride is_contiguous is_floating_point is_complex requires_grad
    grad_fn is_leaf layout new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like
    rand_like randn_like element_size storage_offset data_ptr __len__ is_cuda is_sparse is_quantized is_meta is_mkldnn
    names grad _version __repr__ __format__ __hash__ untyped_storage is_nested is_cpu is_mps is_xpu is_inference
    result_type can_cast is_same_size output_nr _backward_hooks is_complex get_device retains_grad is_nonzero _is_view
    allclose equal is_shared itemsize nbytes""".split()
)

# Functions that read only the shape or the dtype of their second argument.
LIKE_ANOTHER = frozenset("type_as view_as reshape_as expand_as to".split())

IN_PLACE_DUNDERS = frozenset("iadd isub imul itruediv idiv ipow imatmul".split())
FLAGS = frozenset("requires_grad_ share_memory_ rename_ detach_".split())


def name_of(function: Any) -> str:
    """A function's name; for a property such as ``Tensor.T`` the property's."""
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        name = getattr(function.__self__, "__name__", name)
    return name


def base_name(name: str) -> str:
    """``add`` for ``__add__``, ``__iadd__``, ``add_``."""
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name in IN_PLACE_DUNDERS:
            name = name[1:]
    elif name.endswith("_"):
        name = name[:-1]
    return name


def is_in_place(name: str) -> bool:
    """Whether the function writes into its first argument."""
    if name.startswith("__"):
        return name[2:-2] in IN_PLACE_DUNDERS
    return name.endswith("_") and not name.endswith("__")


def writes(name: str) -> bool:
    """Whether the function changes the values of its first argument; assignment to an index does, a flag does not."""
    return (is_in_place(name) and name not in FLAGS) or name == "__setitem__"
