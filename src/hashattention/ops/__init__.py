"""The kernel API: plain tensors in and out, each op a torch custom op under ``torch.ops.hashattention``."""

from hashattention.ops.attend import attend
from hashattention.ops.decode import NewKey, decode, group_queries
from hashattention.ops.encode import encode_query, encode_signature, write_signature
from hashattention.ops.logits import logits
from hashattention.ops.pool import pool
from hashattention.ops.remainder import add_remainder
from hashattention.ops.score import score
from hashattention.ops.select import score_select, select

__all__ = [
    "NewKey",
    "add_remainder",
    "attend",
    "decode",
    "encode_query",
    "encode_signature",
    "group_queries",
    "logits",
    "pool",
    "score",
    "score_select",
    "select",
    "write_signature",
]
