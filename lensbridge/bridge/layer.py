"""One layer of a watched run: its output as its input plus branches, and where each branch's norm stands."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from .architecture import Attention, Block, Branch, Norm
from .norm import describe_norm
from .parts import Parts, name_parts
from .seen import BIAS, TIMES, Terms, Trace, Visit, has_weights, head_of, into

_STEPS = 16


@dataclass
class _Sum:
    """The stream, by the source it goes on from, after some branches were added."""

    stream: str
    total: Terms


class Layer:
    """Reads one layer off a trace.

    Args:
        model: The model (module types and weights' shapes are looked at, not values).
        seen: The watched run.
        path: The layer.
        inside: Paths of the modules in it that ran.
        call: Which call of the layer, where a model runs it several times.
    """

    def __init__(
        self, model: nn.Module, seen: Trace, path: str, inside: list[str], call: int = 0
    ) -> None:
        self.model = model
        self.seen = seen
        self.path = path
        self.call = call
        self.x = into(path, call)
        self.whole = seen.visits[path][call]
        times = len(seen.visits[path])
        self.visits = [seen.visits[p][call] for p in inside if len(seen.visits[p]) == times]
        self.at = {visit.path: visit for visit in self.visits}
        self.visits.sort(key=lambda visit: (visit.path.count("."), visit.ended))
        self.norms = [v for v in self.visits if self.is_norm(v)]
        self.normed = {next(iter(v.terms_out or {}), ""): v for v in self.norms}
        self.on_stream: list[Visit] = []
        self.parts = Parts(model, seen, self.path, self.x, call, self.at, self.reads_stream)

    # --- the stream ------------------------------------------------------------------------------

    def is_norm(self, visit: Visit) -> bool:
        """Whether a call is a norm's or a layer scale's: no matrix inside, same shape, another value."""
        module = self.model.get_submodule(visit.path)
        entering, value = visit.entering, visit.value
        if not isinstance(entering, Tensor) or not isinstance(value, Tensor):
            return False
        if entering.shape != value.shape or visit.terms_in == visit.terms_out:
            return False
        if "norm" in type(module).__name__.lower():
            return not any(has_weights(part) for part in module.modules() if part is not module)
        return (
            not module._modules
            and any(p is not None for p in module._parameters.values())
            and not has_weights(module)
        )

    def leads_back(self, source: str) -> Visit | None:
        """The norm on the stream that made this source, if one did."""
        norm = self.normed.get(source)
        if norm is None or norm.terms_in is None:
            return None
        return norm if self.is_stream(norm.terms_in) else None

    def is_stream(self, terms: Terms | None) -> bool:
        """Whether a tensor is the residual stream, or the stream behind a norm and what was added since."""
        return terms is not None and any(
            head_of(source)[0] == self.x or self.leads_back(source) for source in terms
        )

    def reads_stream(self, visit: Visit) -> bool:
        """Whether a call reads the stream, or a norm of it."""
        terms = visit.terms_in
        if terms is None or self.is_stream(terms):
            return terms is not None
        norm = self.normed.get(next(iter(terms), "")) if len(terms) == 1 else None
        return norm is not None and self.is_stream(norm.terms_in)

    def flow(self) -> list[_Sum | Visit] | None:
        """The sums and norms from input to output, or None when the output is nothing of the kind."""
        state = self.whole.terms_out
        steps: list[_Sum | Visit] = []
        while state is not None and len(steps) < _STEPS:
            state = {s: c for s, c in state.items() if c}
            if any(head_of(s)[0] == self.x for s in state):
                if state != {self.x: 1.0}:
                    steps.append(_Sum(self.x, state))
                return steps[::-1]
            base = next((s for s in state if self.leads_back(s)), None)
            if base is None:
                return None
            norm = self.normed[base]
            if len(state) > 1:
                steps.append(_Sum(base, state))
            steps.append(norm)
            self.on_stream.append(norm)
            state = norm.terms_in
        return None

    # --- the branches ----------------------------------------------------------------------------

    def block(self) -> Block:
        """The layer as facts."""
        steps = self.flow()
        if steps is None:
            why = "its output is no sum of its input and what its modules make"
            return Block(self.path, self.loose(), unproved=why, call=self.call)
        branches: list[Branch] = []
        pending: Visit | None = None
        for step in steps:
            if isinstance(step, Visit):
                if pending is not None:
                    why = "two norms stand on the stream with nothing added between"
                    return Block(self.path, self.loose(), unproved=why, call=self.call)
                last = branches[-1] if branches else None
                if last is not None and last.place == "before" and last.ln is None:
                    branches[-1] = replace(last, ln=self.norm(step), place="after")
                else:
                    pending = step
                continue
            found, why = self.added(step)
            if why:
                return Block(self.path, self.loose(), unproved=why, call=self.call)
            if pending is not None:
                found[0] = replace(
                    found[0], ln=self.norm(pending), place="stream", reads=pending.path
                )
                pending = None
            branches += found
        named = name_parts(branches)
        held = {branch.part.path for branch in named if isinstance(branch.part, Attention)}
        inner = [part for part in self.parts.attentions() if part.path not in held]
        hidden = name_parts([*named, *(Branch("", part) for part in inner)])[len(named) :]
        return Block(self.path, named, call=self.call, ln_out=self.norm(pending), inner=hidden)

    def loose(self) -> tuple[Branch, ...]:
        """Parts that can be told although the sum cannot: attention, by what happens inside it."""
        return name_parts([Branch("", part) for part in self.parts.attentions()])

    def added(self, step: _Sum) -> tuple[list[Branch], str]:
        """The branches of one step in the order they are added; or why they cannot be told apart."""
        made, left = self.makers(step)
        if any(not source.startswith(BIAS) for source in left):
            return [], f"it adds {len(left)} value(s) that no module makes"
        read = [self.branch(visit) for visit in made]
        # The stream between the sums: what some branch reads that already holds another's output.
        states = [terms for _, terms in read if terms is not None and _holds(terms, made)]
        states = sorted(states, key=len)
        states = [s for i, s in enumerate(states) if not any(_same(s, t) for t in states[:i])]
        branches: list[Branch] = []
        placed: set[int] = set()
        before: Terms = {step.stream: 1.0}
        for state in [*states, step.total]:
            group = [
                i for i, visit in enumerate(made) if i not in placed and _holds(state, [visit])
            ]
            placed |= set(group)
            factors = _factors(before, state)
            if not group or factors is None:
                return [], "its sums do not follow from each other"
            expected = _times(before, *factors)
            biases = {s: c for s, c in state.items() if s in left and s not in expected}
            expected.update(biases)
            for place, index in enumerate(group):
                own = made[index].terms_out or {}
                scaled = _factors(own, state)
                if scaled is None:
                    return [], f"what {made[index].path} makes is added in several ways"
                expected.update(_times(own, *scaled))
                branch, reads = read[index]
                if place == 0 and (reads is None or not _same(reads, before)):
                    branch = replace(branch, reads=None)
                skip, skip_by = factors if place == 0 else (1.0, "")
                branches.append(
                    replace(
                        branch,
                        joins=place > 0,
                        skip=skip,
                        skip_by=_names(skip_by),
                        scale=scaled[0],
                        scale_by=_names(scaled[1]),
                        bias=tuple(s.removeprefix(BIAS) for s in biases) if place == 0 else (),
                    )
                )
            if not _same(expected, state):
                return [], "its sums do not follow from each other"
            before = state
        return branches, ""

    def makers(self, step: _Sum) -> tuple[list[Visit], Terms]:
        """The outermost modules that make the values of a sum, in order, and what none makes."""
        rest = {s: c for s, c in step.total.items() if head_of(s)[0] != step.stream}
        rest.pop(step.stream, None)
        found: list[Visit] = []
        # What has parameters comes first: an idle dropout hands on what it was given. So does an exact match:
        # a layer scale that is a module of its own is part of what is added.
        for exact, owning in ((True, True), (False, True), (False, False)):
            for visit in sorted(self.visits, key=lambda v: -len(v.terms_out or ())):
                terms = visit.terms_out
                factors = _factors(terms, rest) if terms else None
                if factors is None or (exact and factors[1]):
                    continue
                if owning and not self.has_parameters(visit):
                    continue
                found.append(visit)
                gone = _times(terms or {}, *factors)
                rest = {s: c for s, c in rest.items() if s not in gone}
        return sorted(found, key=lambda visit: visit.ended), rest

    def has_parameters(self, visit: Visit) -> bool:
        """Whether a module has anything of its own."""
        return next(self.model.get_submodule(visit.path).parameters(), None) is not None

    def branch(self, visit: Visit) -> tuple[Branch, Terms | None]:
        """What the module whose output enters the sum belongs to, and the stream it reads."""
        makes, ln_post = visit, None
        if self.is_norm(visit) and not self.is_stream(visit.terms_in):
            inner = (
                v for v in self.visits if v.terms_out == visit.terms_in and self.has_parameters(v)
            )
            found = next(inner, None)
            if found is not None:
                makes, ln_post = found, self.norm(visit)
        part, entries = self.parts.of(makes)
        read = {next(iter(entry.terms_in or {}), "") for entry in entries}
        ln = next(
            (
                norm
                for source, norm in self.normed.items()
                if source in read and self.is_stream(norm.terms_in) and norm not in self.on_stream
            ),
            None,
        )
        reader = ln or next((e for e in entries if self.is_stream(e.terms_in)), None)
        branch = Branch(
            "",
            part,
            ln=self.norm(ln),
            ln_post=ln_post,
            makes=makes.path,
            adds=visit.path,
            reads=None if reader is None else reader.path,
        )
        return branch, None if reader is None else reader.terms_in

    def norm(self, visit: Visit | None) -> Norm | None:
        """A norm's facts."""
        if visit is None:
            return None
        return describe_norm(self.model.get_submodule(visit.path), visit.path)


def _same(left: Terms, right: Terms | None) -> bool:
    return right is not None and _rounded(left) == _rounded(right)


def _holds(state: Terms, made: list[Visit]) -> bool:
    """Whether a state has the output of one of these calls in it."""
    return any(_factors(visit.terms_out or {}, state) is not None for visit in made)


def _factors(part: Terms, total: Terms) -> tuple[float, str] | None:
    """The number and the parameters by which a combination is in another; None when it is not."""
    found: set[tuple[float, str]] = set()
    for source, value in part.items():
        match = next((s for s in total if s == source or s.startswith(source + TIMES)), None)
        if match is None:
            return None
        found.add((round(total[match] / value, 9), match[len(source) :]))
    return found.pop() if len(found) == 1 else None


def _times(terms: Terms, factor: float, by: str) -> Terms:
    return {source + by: value * factor for source, value in terms.items()}


def _names(by: str) -> tuple[str, ...]:
    """Parameters by which something is scaled."""
    return tuple(by.split(TIMES)[1:])


def _rounded(terms: Terms) -> Terms:
    return {source: round(value, 6) for source, value in terms.items() if abs(value) > 1e-9}
