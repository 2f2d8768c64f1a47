"""Triton's own form of a kernel, before it is made for a GPU: no GPU, and no more than a moment."""

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

TARGET = GPUTarget("cuda", 90, 32)


def inlined(source, options):
    """The text of the source's module, functions inlined.

    Raises:
        triton.CompilationError: what the language refuses.
    """
    backend = make_backend(TARGET)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(backend.target, parsed, backend.get_codegen_implementation(parsed),
                            backend.get_module_map(), context)
    return str(type(backend).make_ttir(module, {}, parsed, 90))
