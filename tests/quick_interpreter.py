"""Triton's interpreter without work that it repeats, which is half of the time that our kernels take in it: it puts its
own functions into `triton.language` anew at every call of one kernel function by another, where they are since the
launch, and makes a table of dtypes at every operation. What it computes, and how, stays as it is."""

from __future__ import annotations

import inspect
from typing import Any


def make_quick() -> None:
    """For this process; nothing where the installed Triton has its interpreter written otherwise."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "_get_np_dtype")):
        return
    put_in, numpy_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    languages: dict[Any, list[Any]] = {}
    dtypes: dict[str, Any] = {}

    def put_in_once(fn: Any) -> Any:
        if fn not in languages:
            seen = (value for value in fn.__globals__.values() if inspect.ismodule(value))
            languages[fn] = [module for module in seen if module in (tl, tl.core)]
        # Its own functions are no builtins of the language, and the end of a launch takes all of them out again.
        if languages[fn] and not any(tl.core.is_builtin(language.load) for language in languages[fn]):
            return interpreter._LangPatchScope()
        return put_in(fn)

    def remembered_dtype(dtype: Any) -> Any:
        name = dtype.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(dtype)
        return dtypes[name]

    interpreter._patch_lang = put_in_once
    interpreter._get_np_dtype = remembered_dtype
