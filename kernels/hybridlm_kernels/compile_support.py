"""Functions that torch.compile leaves alone."""

from __future__ import annotations

from torch._compile import _disable_dynamo

# Decorator: torch.compile breaks the graph at the function and runs it as plain Python, with everything it calls. This
# is torch.compiler.disable, but it imports the compiler when the function is first called rather than when it is
# defined. That import takes as long as the one of torch, and a command that only reads configs never needs it.
leave_uncompiled = _disable_dynamo
