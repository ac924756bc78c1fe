class Shape:
    def __init__(
        self, batch: int, heads: int, signature_heads: int, selection_heads: int, words: int, tokens: int, /
    ) -> None: ...

class Pages:
    def __init__(self, table: int, per_row: int, size: int, count: int, /) -> None: ...

class Bounds:
    def __init__(self, start: int, end: int, budgets: int, mask: int, mask_stride: int, capacity: int, /) -> None: ...

class Cache:
    def __init__(self, values: int, request_stride: int, head_stride: int, token_stride: int, dim: int, /) -> None: ...

class Codes:
    def __init__(
        self,
        code: int,
        packed: bool,
        shape: Shape,
        signatures: int,
        request_stride: int,
        head_stride: int,
        pages: Pages,
        /,
    ) -> None: ...

class Stage:
    def __init__(
        self, weights: int, weight_stride: int, inputs: int, outputs: int, biases: int, bias_stride: int, /
    ) -> None: ...

class Encoding:
    def __init__(
        self,
        input: int,
        input_dtype: int,
        request_stride: int,
        head_stride: int,
        batch: int,
        heads: int,
        tokens: int,
        stages: list[Stage],
        dtype: int,
        bias_dtype: int,
        levels: int,
        /,
    ) -> None: ...

class Attention:
    def __init__(
        self,
        query: int,
        query_dtype: int,
        query_request_stride: int,
        query_head_stride: int,
        cache_dtype: int,
        batch: int,
        query_heads: int,
        kv_heads: int,
        selection_heads: int,
        tokens: int,
        key: Cache,
        value: Cache,
        pages: Pages,
        scale: float,
        softcap: float,
        out: int,
        logsumexp: int,
        /,
    ) -> None: ...

def encode(encoding: Encoding, out: int, scales: int, /) -> None: ...
def pack(logits: int, rows: int, bits: int, words: int, /) -> None: ...
def instruction_sets() -> list[str]: ...
def active() -> str: ...
def use(name: str, /) -> None: ...
def score(codes: Codes, out: int, /) -> None: ...
def select(
    values: int,
    real: bool,
    batch: int,
    heads: int,
    tokens: int,
    bounds: Bounds,
    indices: int,
    counts: int,
    /,
) -> None: ...
def score_select(codes: Codes, bounds: Bounds, indices: int, counts: int, /) -> None: ...
def attend(attention: Attention, indices: int, counts: int, slots: int, /) -> None: ...
def add_remainder(
    out: int,
    dtype: int,
    logsumexp: int,
    query: tuple[int, int, int],
    sums: tuple[int, int, int],
    taken: int,
    lengths: int,
    coefficients: int,
    sizes: tuple[int, int, int, int, int, int],
    scale: float,
    softcap: float,
    mixed: int,
    /,
) -> None: ...
def decode(encoding: Encoding, codes: Codes, bounds: Bounds, attention: Attention, key: Encoding | None) -> None: ...
