"""A recorded call as one flat graph, run by replay, by the inductor compiler or as a CUDA graph."""

from __future__ import annotations

import functools
import importlib
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.autograd import forward_ad

from chainrule.capture.whole_recorder import CompileError
from chainrule.execute.memory import Memory, Watch
from chainrule.execute.replay import Source, compile_program
from chainrule.execute.workspace import free, observe
from chainrule.maps.staging import Instruction, Program, Ref, Staged, reads

aten = torch.ops.aten

#: From the values of the inputs to the results.
Run = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]

#: The same, of a list that is emptied.
Code = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


@dataclass
class Flat:
    """A recorded call.

    Attributes:
        program: its calls, with the number of an input as its key.
        results: its results.
        count: the number of its inputs.
        given: how many of the inputs are arguments; the others were found outside of them.
        joined: whether the results have to be part of autograd's graph.
    """

    program: Program
    results: list[Staged]
    count: int
    given: int
    joined: bool = False

    def detach(self, without_graph: set[int], with_graph: set[int]) -> None:
        """Take those results of calls out of autograd's graph that were out of it when the call was recorded.

        Args:
            without_graph: slots of values that had no graph.
            with_graph: slots of values that had one (or were leaves of one).
        """
        program = self.program
        made: list[Instruction] = []
        for instruction in program.instructions:
            joined = not with_graph.isdisjoint(reads(instruction))
            outside = [slot for slot in instruction.outputs if slot in without_graph and program.kinds[slot][1].is_floating_point]
            if not joined or not outside:
                made.append(instruction)
                continue
            fresh = {slot: program.new_slot() for slot in outside}
            for slot, new in fresh.items():
                program.kinds[new] = program.kinds[slot]
                if slot in program.views:
                    program.views.add(new)
                program.views.add(slot)
            made.append(instruction._replace(outputs=tuple(fresh.get(slot, slot) for slot in instruction.outputs)))
            made += [
                Instruction(torch.Tensor.detach, (Ref(new),), {}, (slot,), is_tuple=False) for slot, new in fresh.items()
            ]
        program.instructions = made

    def graph(self) -> fx.GraphModule:
        """The calls as a graph of torch.fx, whose placeholders are the inputs in their order."""
        source = Source(self.program, self.results, spelled=False)
        source.copied.difference_update(source.of_inputs())
        graph, root = fx.Graph(), torch.nn.Module()
        nodes: dict[int, fx.Node] = {}
        for number in range(self.count):
            node = graph.placeholder(f"input_{number}" if number < self.given else f"closed_over_{number - self.given}")
            if number in self.program.inputs:
                nodes[self.program.inputs[number]] = node
        for slot, tensor in source.constants.items():
            if slot in source.used:
                root.register_buffer(f"constant_{slot}", tensor)
                nodes[slot] = graph.get_attr(f"constant_{slot}")
        for instruction in source.kept:
            function = self.program.overloads.get(instruction.function, instruction.function)
            args, kwargs = _with_nodes((instruction.args, instruction.kwargs), nodes)
            node = graph.call_function(function, args, kwargs)
            if instruction.is_tuple:
                for number, slot in enumerate(instruction.outputs):
                    nodes[slot] = graph.call_function(operator.getitem, (node, number))
            elif instruction.outputs:
                nodes[instruction.outputs[0]] = node
        results = []
        for number, wanted in enumerate(source.wanted):
            assert wanted is not None
            result = nodes[wanted]
            results.append(graph.call_function(aten.clone.default, (result,)) if number in source.copied else result)
        graph.output(tuple(results))
        graph.lint()
        return fx.GraphModule(root, graph, "Flat")

    def replay(self) -> Run:
        """Straight-line calls of torch's functions."""
        runner = compile_program(self.program, self.results, views=True)
        source: Source = runner.source_of  # type: ignore[attr-defined]
        plain, instructions = runner, source.kept
        if not self.joined:
            plain, instructions = runner.plain, source.plain or instructions  # type: ignore[attr-defined]

        def run(values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            # Tangents of torch's own forward mode are not carried by calls that write over an operand.
            return (plain if forward_ad._current_level < 0 else runner)(values, ())

        run.source = plain.source  # type: ignore[attr-defined]
        run.source_of, run.instructions = source, instructions  # type: ignore[attr-defined]
        return run

    def inductor(self, values: Sequence[torch.Tensor]) -> Run:
        """Code generated by torch's inductor compiler.

        Args:
            values: example inputs.

        Raises:
            CompileError: if the compiler fails.
        """
        module = self.graph()
        code: Code | None = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own, about itself
                if self.joined:
                    called = torch.compile(module, fullgraph=True, dynamic=False)
                    called(*values)
                else:
                    # Examples of their own: the compiler takes tensors that are the same here for the same in each call.
                    examples = [_example(value) for value in values]
                    called, code = _lowered(module, examples)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CompileError(f"chainrule.compile: the inductor backend failed on this graph: {reason}") from error
        writes = any(i.writes for i in self.program.instructions)
        plain, given = functools.cache(self.replay), self.given

        def reads_memory(values: Sequence[torch.Tensor]) -> bool:
            # Of what was closed over, the code reads memory that may be negated or conjugated only when it is read.
            return all([not (value.is_neg() or value.is_conj()) for value in values[given:]])

        if self.joined and not writes:
            return lambda values: called(*values) if reads_memory(values) else plain()(values)
        constants = [*module.buffers()]
        alone = code is not None and not writes and reads_memory(values) and self._stands_alone(called, code, constants, values)

        def run(values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            # The code knows nothing of tangents of torch's own forward mode.
            if forward_ad._current_level >= 0 or not reads_memory(values):
                return plain()(values)
            # The compiled code takes it that what it writes to is seen through one input only.
            if writes and len({value.untyped_storage().data_ptr() for value in values}) < len(values):
                return plain()(values)
            found: Sequence[torch.Tensor] = code([*constants, *values]) if alone else called(*values)  # type: ignore[misc]
            return found

        if alone:
            run.code, run.constants = code, constants  # type: ignore[attr-defined]
        return run

    def _stands_alone(
        self, called: Callable[..., Any], code: Code, constants: list[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> bool:
        """Whether the compiler's code does all of what it does with what torch puts around it.

        That gives back views of inputs, keeps autograd off and tells profilers, and takes longer than a small kernel.

        Args:
            called: the code with what is around it.
            code: the code.
            constants: what it takes before the inputs.
            values: example inputs.
        """
        source = Source(self.program, self.results, spelled=False)
        followed = torch.is_grad_enabled() and any(value.requires_grad for value in values)
        if followed or source.of_inputs() or any(i.keep for i in self.program.instructions):
            return False
        try:
            found, expected = code([*constants, *values]), called(*values)
            torch.testing.assert_close(list(found), list(expected), rtol=0.0, atol=0.0, equal_nan=True, check_stride=True)
        except Exception:  # of whatever kind: there is another way
            return False
        return True

    def cudagraph(self, values: Sequence[torch.Tensor]) -> Run:
        """A CUDA graph. Arguments are copied to fixed places; what was closed over is read where it is.

        Args:
            values: example inputs.

        Raises:
            CompileError: if an input is not on a CUDA device, the calls write to their inputs, or autograd has to
                see them.
        """
        if self.joined:
            raise CompileError("chainrule.compile: backend='cudagraphs' makes no graph for autograd; use torch.no_grad()")
        if not values or not all(value.is_cuda for value in values[: self.given]):
            raise CompileError("chainrule.compile: backend='cudagraphs' needs arguments on a CUDA device")
        if any(slot in self.program.inputs.values() for i in self.program.instructions for slot in i.writes):
            raise CompileError("chainrule.compile: backend='cudagraphs' cannot replay calls that write to their inputs")
        run = self.replay()
        fixed = [value.clone() if number < self.given else value for number, value in enumerate(values)]
        places = [value.data_ptr() for value in fixed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):
                run(fixed)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            results = run(fixed)
        # A result that is an input, or a view of one, is made by the calls themselves in each run.
        views = Source(self.program, self.results).of_inputs()

        def replay(values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            if any(value.data_ptr() != place for value, place in zip(values[self.given :], places[self.given :], strict=True)):
                return run(values)
            for place, value in zip(fixed[: self.given], values, strict=False):
                place.copy_(value)
            graph.replay()
            if views:
                direct = run(values)
                return [direct[n] if n in views else result.clone() for n, result in enumerate(results)]
            return [result.clone() for result in results]

        return replay


def run_watched(run: Run, values: Sequence[torch.Tensor], watch: Watch, *, plain: bool) -> Sequence[torch.Tensor]:
    """Run a graph, and predict its memory; that of calls which are not known one by one is observed.

    Args:
        run: runs the graph.
        values: of its inputs.
        watch: what counts.
        plain: whether it runs without a graph of autograd's.
    """
    source: Source | None = getattr(run, "source_of", None)
    if source is not None:
        saved = source.observe(values, (), plain=plain)
        watch.add_program(memory := source.memory(None, saved, plain=plain))
        results = run(values)
    elif free():
        results, space = observe(lambda: run(values))
        watch.add_program(memory := Memory(space.results, space.results + space.work))
    else:
        return run(values)
    watch.add_results(results, memory)
    return results


def _lowered(module: fx.GraphModule, examples: Sequence[torch.Tensor]) -> tuple[Callable[..., Any], Code | None]:
    """What torch's inductor compiler makes of a graph, and the code within that, which takes its constants first.

    Shapes and strides of inputs were compared by whoever runs a graph; the code does not do it once more.
    """
    compiler = importlib.import_module("torch._inductor.compile_fx")
    made: list[Any] = []

    @functools.wraps(compiler.compile_fx_inner)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        made.append(compiler.compile_fx_inner(*args, **kwargs))
        return made[-1]

    called = compiler.compile_fx(module, examples, inner_compile=compiled, config_patches={"size_asserts": False})
    if not _is_self_contained(made):  # what calls of torch's return is to be compared with what the compiler expects
        made.clear()
        called = compiler.compile_fx(module, examples, inner_compile=compiled)
    code = getattr(made[0], "current_callable", None) if len(made) == 1 else None
    return called, code


def _is_self_contained(made: Sequence[Any]) -> bool:
    """Whether compiled code calls nothing but kernels that write to memory of its own."""
    texts = [str(getattr(code, "source_code", "")).partition("def call(")[2].partition("\nrunner = ")[0] for code in made]
    return all(text and "torch.ops." not in text for text in texts)


def _example(value: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind with memory of its own."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _with_nodes(tree: Any, nodes: dict[int, fx.Node]) -> Any:
    if isinstance(tree, Ref):
        return nodes[tree.slot]
    if isinstance(tree, dict):
        return {name: _with_nodes(item, nodes) for name, item in tree.items()}
    if isinstance(tree, list):
        return [_with_nodes(item, nodes) for item in tree]
    return tuple(_with_nodes(item, nodes) for item in tree) if type(tree) is tuple else tree
