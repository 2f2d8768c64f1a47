"""Triton's own form of a kernel, before it is made for a GPU: no GPU, and no more than a moment."""

import re

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


def rewritten_tensors(text):
    """The parameters that a kernel reads in a loop and writes somewhere, of the text that `inlined` gives.

    Pointers that are chosen between, or carried through branches, are taken to be any of the parameters.
    """
    parameters = re.findall(r"(%\w+): !tt\.ptr", next(line for line in text.splitlines() if "tt.func public" in line))
    behind = {name: {name} for name in parameters}
    read, written, loops = set(), set(), []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if "scf.for " in line:
            loops.append(indent)
        elif loops and indent == loops[-1] and line.lstrip().startswith("}"):
            loops.pop()
        if found := re.match(r"\s*(%\w+) = tt\.(?:addptr|splat|broadcast|expand_dims) (%[\w#]+)", line):
            behind[found[1]] = behind.get(found[2], set(parameters))
        if "iter_args(" in line:
            result = re.match(r"\s*(%\w+)", line)[1]
            for place, (inner, initial) in enumerate(re.findall(r"(%\w+) = (%[\w#]+)", line.split("iter_args(")[1])):
                behind[inner] = behind[f"{result}#{place}"] = behind.get(initial, set(parameters))
        if loops and (found := re.search(r"tt\.load (%[\w#]+)", line)):
            read |= behind.get(found[1], set(parameters))
        elif found := re.search(r"tt\.store (%[\w#]+)", line):
            written |= behind.get(found[1], set(parameters))
    return read & written
