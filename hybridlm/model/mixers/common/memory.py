"""The memory of a recurrent layer, which gated memory units of later layers read.

B rows, T tokens, I channels.
"""

from __future__ import annotations

from hybridlm.model.sharing import SharedKind

# The output of a recurrence before it is gated, [B, T, I] of the tokens held here.
MEMORY = SharedKind("the memory of a recurrent layer", gradient=True)
