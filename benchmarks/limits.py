"""What limits the rows that miss a ratio, as profiles showed it."""

from __future__ import annotations

#: By row; a row's line is printed only while the row misses a ratio.
LIMITS: dict[str, str] = {
    "A1": "of a plain call the calls of the plan are a fifth; the rest is making a tape, recording two ops (3 to 5 µs each "
    "beside the kernels), looking the plan up and putting the result together. Kept: handlers, records and constants "
    "in C, torch's snapshots of its state left out. Compiled, arguments are compared by torch's guards (2 µs), and the "
    "code of the inductor backend is called without what torch puts around it: a call takes 4 to 5 µs, by hand 14.",
    "A2": "beside the kernels a plain call records two ops (3 to 5 µs each). Kept: everything from the arguments to the "
    "result in one call in C (half of the time beside the kernels), one product written straight into the result. Compiled "
    "it is as fast as by hand.",
    "A3": "as A2, whose text says what was tried.",
    "A7": "bound by writing the result, most of which are zeros: the formula by hand is itself 11 to 14 times faster than "
    "torch.func. Kept: the blocks are written onto the diagonal of fresh zeros without a temporary; the two calls of "
    "the row are made one after the other, each with its entry. By the time of the processor the ratio is 12 to 18.",
    "A5": "a third of the call is arithmetic; most of the rest is running the layer under a tape and a vmap, whose first op "
    "in a call costs 10 to 15 µs more than a further one: its code is not in the processor's cache any more. Kept: alias, "
    "tape, level, key, look-up and replay in one call in C (half of the time beside the kernels), replay on the stored "
    "tensors with no mode active, fewer calls by `addcmul`. Compiled by the inductor backend it takes half of the time "
    "by hand (one kernel after the product, 18 µs): 8 are writing the result, 4 what a compiled call takes at all (A1).",
    "A6": "the kernels are those by hand (one product of the size of the result is 90 % of them); the rest of an eager call "
    "is recording through a tape and a vmap. Tried: the other order of the operands of that product (no difference). "
    "Compiled it takes no longer than by hand, that is to write 8.7 MB; the best compiled peer is bound by the same. By the "
    "time of the processor a plain call takes 1.1 of by hand; by the clock of a machine with other work up to 1.9 were seen.",
    "A8f": "half of a plain call of 2 ops is the recorded function and 3 calls of arithmetic; the rest are checks of the "
    "tangent, the nest's key and look-up. Kept: tape, run, key and look-up in one call in C (a third less), what a nest is "
    "made of is found once per function.",
    "A8r": "as A8f, in two parts (first what does not depend on the cotangent). Kept: what of a run is read is found once.",
    "A9": "bound by writing the zeros of the 256³ block. Kept: zeros of more than 32 MB are written past the caches, half "
    "of the time that torch's own take.",
    "B1": "bound by one matrix product; the formula by hand is itself only 2.4 to 3 times faster than the best torch.func "
    "expression with one thread, as that one, too, is a product with a dense matrix of 300 columns. Measured and no "
    "faster: the weights on the other factor (1.06 of the time), their square root on both (1.25), the transposed "
    "factor copied first (1.6). Kept: the result is symmetric, and one triangle of its "
    "blocks is computed (a fifth less than by hand).",
    "B2": "the forward Laplacian by hand is itself only about 3 times faster than the best torch.func expression. Kept: "
    "products that are larger than their factors stand in the order of the result (half of the time for the Laplacian "
    "of a whole batch), so that a plain call takes as long as by hand. The planner's search compares the orders of "
    "the products and takes this one.",
    "B3": "two products of the size of the result are most of the calls; recording is the rest. Tried: one matrix product "
    "for all samples in place of one per sample (kept: 3.1 ms to 0.2 ms), its result laid out by samples (kept: no "
    "copy of the signals).",
    "B5": "as fast as the formula by hand (within a tenth), which is itself 1.3 times faster than the best torch.func "
    "expression. Of 44.7 ms of the processor 25 are the transposed convolution of 320 cotangents, 850 million "
    "multiply-adds at 34 of the 40 a nanosecond that a matrix product reaches on an AVX2 core; 7.6 the network itself "
    "(2.9 its convolution, 3.7 pooling), 5 unpooling (24 MB of zeros and 1.5 million writes), 1.6 the mask, 2.5 the "
    "product of the last convolution, 3.1 `col2im`. A ratio of 1.5 leaves 39. Measured and no faster: blocks of rows "
    "that fit the cache (41.5 against 38.1 behind the network), channels last (22 for the convolution, but 8 for "
    "unpooling and 41.6 in all), `max_unpool2d` (10.5). Pooling leaves one entry in four, another in each channel: "
    "products over channels cannot skip the zeros.",
    "B6": "the same convolutions as torch.func's; what is left is recording in Python. Weights of samples apart are a product of "
    "patches where kernels are 1×1 or patches small, the grouped kernel else (chosen by size); pooling of many "
    "channels runs with channels last, the loss is one op. Kept, too: parts of composite ops, views and numbers beside "
    "batched tensors are run by the vmap without a way through torch's dispatcher.",
    "B18": "by the time of the processor 1.02 of by hand (105.6 and 103.6 ms): the same matrix products. Larger ratios were "
    "seen by the clock of a machine with other work.",
    "B7": "recording in Python, about 5 µs an op, and some 15 small calls for the cross-entropy.",
    "B7t": "recording in Python: 46 ops, most of them small views inside of `multi_head_attention_forward`; the replay alone "
    "is as fast as torch.autograd. Kept: dropout of nothing is no op, composite ops are recorded in parts in one "
    "pass, torch's Python functions are entered so that the calls in them are taken early.",
    "B9": "by hand three products and two passes; of a plain call a third is recording three layers through a tape and a "
    "vmap, and the entry. Kept: the trace contracted as by hand, replays on the stored tensors with no mode active (a tenth). "
    "Compiled it is faster than by hand.",
    "B20f": "recording: 34 records, whose graph is made op by op where parameters require grad, and the Python of torch's "
    "modules and of its door for functions (some 8 µs each, seven times), which passes the mode. Kept: what a composite runs is "
    "found once per signature, and its ops are run and recorded in C (a third less), values are looked up by their graph nodes "
    "only where autograd may bring what it has kept. Tried and dropped: one node for the replay, whose graph is made on "
    "backward; it takes 220 µs in place of 280 here and makes small networks slower.",
    "B10": "as B7, three times (the model, the loss, the gradient of the loss); the calls themselves take as long as by hand.",
    "B11": "as B2: the formula by hand is itself only 2 to 3 times faster than torch.func. The planner's search compares "
    "the orders of the products and takes the one of the formula.",
    "B12a": "a wrapper tensor per op takes 1.0 µs and freeing it 0.5, as much as the whole overhead of torch.vmap's C++ per "
    "op. Kept: operators and methods of mapped tensors are C functions that need no function mode (8 to 2 µs an op "
    "beside the kernel), the dispatcher's state asked in its own functions. Tried and dropped: the Python handlers "
    "compiled by mypyc.",
    "B12b": "half of the call is `functional_call`'s exchange of the parameters, for either library.",
    "B13b": "recording, some 3 µs an op; the pullback itself is two calls an op.",
    "B14b": "by hand 2.5 times faster than torch.func. Kept: from its third call on, a pullback compares its cotangent with the "
    "one before and runs the plan (22 to 7 µs beside the kernels of 57; the ratio from 1.85 to 2.15 by the time of the "
    "processor). Between runs on a shared machine it varies by a tenth.",
    "B14c": "by hand, with each layer's share added inside its product, 1.5 times faster than torch.func: 125 million "
    "multiply-adds in three products take some 5.2 of 5.9 ms. One with weights that all tangents share runs at 34 "
    "multiply-adds a nanosecond, those of 32 rows with 100 matrices at 19 in each of six layouts tried (2.4 to 2.8 ms "
    "for 52 million), as they read 6.6 MB once. Kept: each layer's share is added inside its product, as by hand (a layer of "
    "128 by 128 takes 3.65 ms of the processor in place of 4.19). Recording the network and entering the map take 0.6 to 0.8.",
    "B14d": "by hand 1.3 times faster than torch.func (5.2 against 6.9 ms of the processor), and the mapped pullback takes "
    "5.4 ms: 126 million multiply-adds, of which those for the weights' cotangents write 6.6 MB. One product for all "
    "samples, with these first in memory, is no faster than a product per cotangent (2.4 against 2.2 ms). Recording "
    "the network takes 0.6 ms.",
    "B16": "one product of matrices writes the whole result, the covariance is added on its diagonal, as by hand; stacking "
    "the factors of that product, and small calls. Tried: a sum of three products and a block diagonal (twice as "
    "slow); the stacks laid out the other way (the product alone is no faster).",
    "B16s": "as B16.",
    "B17": "a third is writing the zeros of the dense result; then one matrix product for the values around each pixel "
    "(bands) and strided copies into the result.",
    "B19a": "three products of 62 million multiply-adds in float64 take some 3.4 of 5.4 ms; by hand (4.2) value, Jacobian and "
    "Laplacian are rows of the same products, here the run of the function and the cotangents read the weights (10 MB) in "
    "three matrix-vector products each, 0.5 and 0.4 ms. Recording is the rest. Kept: thin products as their transposes (a "
    "fifth less time in them); their rows filled up with zeros to whole blocks of four (50 rows take up to a sixth longer "
    "than 52, of which the formula by hand has as many: of 1.37 of its time 1.30 are left). Tried as hand-written calls "
    "in place of the plan's, by the time of the processor: as planned 1.27, with filled rows 1.18, the Laplacian pushed "
    "forward as one more row of each product 1.22 to 1.39 with 51 rows and 1.06 to 1.12 with 52 of them, recording aside. "
    "So the pushed Laplacian gains some 0.08 where its row is joined to those of the Jacobian and the block is filled, "
    "and nothing otherwise; it is not built in. It needs local second derivatives without cotangents (at hand for "
    "element-wise ops), a second sweep with these as seeds, products with one matrix joined behind their operands, and a "
    "plan that counts the bytes of a matrix once for all rows.",
    "C1": "by profile some 90 % of the call are the run of the function under the recorder in Python (41 calls), some four "
    "times the plain run; the replay of the derivative is 5 %, the sparse tensor's object and the look-up 1 % "
    "together. A call costs 3 to 4 µs more than plain. Kept: comparisons, conversions and factories of constants go "
    "past the recorder; views, rolls and joins are recorded in C (12 to 20 µs before). A compiled call records "
    "nothing. On larger grids the arithmetic decides, and the formula by hand is near.",
    "C4l": "by profile nine tenths of the step are SciPy's sparse LU, which is the same for all; of the rest the exact "
    "Jacobian takes a sixth of the time of the differences along groups, and the conversion to CSC a hundredth of the "
    "step. Kept: the ordering for symmetric patterns, which halves the LU for all.",
    "C2": "as C1, of 57 calls, most of them slices and concatenations, which are recorded in C, too (3 to 5 µs each). "
    "Tried: modes entered in C, conversions and factories past the tape (kept, 6 %).",
    "A4": "one product writes the result on block diagonals of zeros, as by hand; the rest is recording, the zeros (their "
    "own time varies by a third between runs: 1.07 to 1.29 of by hand were seen) and freeing 33 MB. Kept: no "
    "temporary of the result's size, zeros of more than 32 MB past the caches.",
    "C5h": "some 20 evaluations of three ops each: an evaluation costs what SciPy's own call of the function costs, and the "
    "exact Jacobians (72 µs each) take as long as the differences that they replace. Kept: values asked for again take the short "
    "way. Between runs the ratio was 0.8 to 1.1.",
    "B15csr": "the arithmetic is one product, as by hand; half of a call is the function itself, which the formula does not run. "
    "Kept: the pattern is read off once; the sum over the mask is a product with it, and no mask is compared (1.7 on a "
    "processor that does nothing else).",
}
