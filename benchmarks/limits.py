"""What limits the rows that miss a ratio, as profiles showed it."""

from __future__ import annotations

#: By row; a row's line is printed only while the row misses a ratio.
LIMITS: dict[str, str] = {
    "A5": "25 µs are arithmetic. The rest is recording two ops through two Python handlers (a tape and a vmap: 1.4 µs for an op "
    "and handler before anything is done), the vmap's tensors (1.7 µs each) and 4 calls. Tried: replay on the stored tensors "
    "(kept), one-pass entry of vmap (kept), fewer calls by `addcmul` (kept).",
    "A6": "one pass over the result more than by hand in some runs; the recorded program has the same products.",
    "A8f": "46 µs for 2 ops: about 20 µs of recording and argument checks, a look-up, 3 calls. The nest runs as one program.",
    "A8r": "as A8f, in two parts (what does not depend on the cotangent first).",
    "A9": "bound by writing the 256³ block; the same calls as by hand.",
    "B1": "bound by one matrix product; the formula by hand is itself only about 2.4 times faster than the best torch.func "
    "expression (jacfwd of grad) with one thread.",
    "B2": "the forward Laplacian by hand is itself only about 3 times faster than the best torch.func expression.",
    "B3": "a batched matrix product whose operands are laid out by samples, and one copy of the layout by samples of its result.",
    "B5": "one transposed convolution of 320 cotangents, 850 million multiply-adds, takes 24 ms at 35 of the 40 a nanosecond "
    "that a matrix product reaches on an AVX2 core, as in torch.func, whose chunks of one row stay in the cache. Pooling leaves "
    "one entry in four, another in each channel: products over channels cannot skip the zeros. Kept: the last convolution as a "
    "product and `col2im`, a scatter in the layout that the convolution reads. Tried and dropped: masks before the scatter "
    "(slower gradients of weights). Not done: blocks of rows inside a plan.",
    "B6": "the same convolutions as torch.func's, grouped for the weights; what is left is recording in Python. Slower by "
    "measurement: patches and batched products, a loop over samples.",
    "B7": "recording in Python, about 5 µs an op, and some 15 small calls for the cross-entropy.",
    "B10": "as B7, three times (the model, the loss, the gradient of the loss).",
    "B11": "as B2: the formula by hand is itself only about 2.4 times faster than torch.func.",
    "B12a": "a Python handler and a wrapper tensor per op (about 5 µs) against torch.vmap's C++ (1.8 µs).",
    "B12b": "as B12a.",
    "B13b": "recording in Python, about 5 µs an op; the pullback itself is two calls an op.",
    "B16": "softmax has two terms and the product rule three more; each is one more pass over the result. By hand two passes.",
    "B17": "a third is writing the zeros of the dense result; then one matrix product for the values around each pixel (bands) "
    "and strided copies into the result.",
}
