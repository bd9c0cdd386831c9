"""Evaluations as a report: each analysis of `evaluation.analysis` as a figure and a table. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

from megatron_prorl.errors import UserError
from megatron_prorl.evaluation.analysis import (
    BINS,
    Correlation,
    Evaluation,
    distribution_shift,
    domain_curves,
    lengths,
    out_of_distribution,
    regimes,
    relative_gains,
    spearman,
    sweeps,
    three_models,
)
from megatron_prorl.evaluation.creativity import (
    LENGTHS,
    LONGEST,
    SHORTEST,
    Corpus,
    Creativity,
    creativity,
    first_samples,
    read_corpus,
)
from megatron_prorl.evaluation.estimators import Difference, Interval
from megatron_prorl.evaluation.regimes import LEVEL, MARGIN, REGIMES, UNDECIDED, corrected
from megatron_prorl.evaluation.results import LENGTH_QUANTILES, OVERALL
from megatron_prorl.report.content import Figure, Mark, Section, Series, Table
from megatron_prorl.tracking.plots import COLOURS, GREY

MARKERS = "osD^vP"
MOST_TASK_FIGURES = 12
REGIME_LOOKS = dict(zip(REGIMES, ((COLOURS[1], "v"), (COLOURS[4], "s"), (COLOURS[2], "^")), strict=True))
REGIME_LOOKS[UNDECIDED] = ("#8C8C8C", "o")


def sections(evaluation: Evaluation, corpus: Sequence[str], prefix: str, *, named: bool) -> list[Section]:
    """The report on an evaluation; `prefix` begins the names of its files, and `named` sections say whose they are.

    Raises UserError for a corpus or samples that cannot be read, and for more models than there are colours.
    """
    if len(evaluation.models) > len(COLOURS):
        raise UserError(f"{evaluation.folder}: {len(evaluation.models)} models are too many to tell apart by colour")
    page = _Page(evaluation, prefix, named)
    parts = [
        page.curves(),
        page.regimes(),
        page.gains(),
        page.shift(),
        *page.sweeps(),
        page.outside(),
        page.lengths(),
        page.creativity(corpus),
    ]
    return [part for part in parts if part]


class _Page:
    """One evaluation's sections, each from one analysis."""

    def __init__(self, evaluation: Evaluation, prefix: str, named: bool) -> None:
        self.evaluation = evaluation
        self.prefix = prefix
        self.named = named
        self.figures: set[str] = set()  # names that are given
        self.tables: set[str] = set()
        self.looks = dict(zip(evaluation.models, zip(COLOURS, cycle(MARKERS), strict=False), strict=False))

    def _name(self, text: str, given: set[str]) -> str:
        """A file's; one that was given already gets a number."""
        plain = name = "".join(character if character.isalnum() else "_" for character in self.prefix + text)
        number = 1
        while name in given:
            number += 1
            name = f"{plain}_{number}"
        given.add(name)
        return name

    def _title(self, text: str) -> str:
        return f"{text}: {self.evaluation.name}" if self.named else text

    def _curve(self, model: str, x: Sequence[float], curve: Sequence[Interval]) -> Series:
        """In percent, over x."""
        colour, marker = self.looks[model]
        points = [_percent(point) for point in curve]
        return Series(
            label=model,
            x=x,
            y=[point.mean for point in points],
            low=[point.low for point in points],
            high=[point.high for point in points],
            colour=colour,
            marker=marker,
            kind="marked",
        )

    def _dots(self, number: int, points: Sequence[Interval], names: Sequence[str]) -> Series:
        """A model's, one beside each name; those of several models below each other."""
        model = self.evaluation.models[number]
        colour, marker = self.looks[model]
        offset = 0.22 * (number - (len(self.evaluation.models) - 1) / 2)
        wide = any(point.low < point.high for point in points)
        return Series(
            label=model,
            x=[point.mean for point in points],
            y=[place + offset for place in range(len(points))],
            low=[point.low for point in points] if wide else (),
            high=[point.high for point in points] if wide else (),
            names=names,
            colour=colour,
            marker=marker,
            kind="points",
        )

    def _pass_figure(self, name: str, title: str, curves: dict[str, list[Interval]]) -> Figure:
        series = [self._curve(model, self.evaluation.results["k"], curve) for model, curve in curves.items()]
        return Figure(
            name=self._name(name, self.figures),
            title=title,
            series=series,
            xlabel="k, samples of a problem",
            log2=True,
            top=10.0,
        )

    def curves(self) -> Section:
        found = self.evaluation
        ks = found.results["k"]

        def of_task(task: str) -> dict[str, list[Interval]]:
            return {model: [found.interval(model, task, k) for k in ks] for model in found.models}

        figures = [self._pass_figure("pass_at_k", "pass@k, mean over tasks (%)", of_task(OVERALL))]
        by_domain = domain_curves(found)
        if len(by_domain) > 1:
            figures += [
                self._pass_figure(f"pass_at_k_{domain}", f"pass@k: {domain} (%)", curves)
                for domain, curves in by_domain.items()
            ]
        if len(found.tasks) <= MOST_TASK_FIGURES:
            figures += [
                self._pass_figure(f"pass_at_k_{task}", f"pass@k: {task} (%)", of_task(task)) for task in found.tasks
            ]
        rows = []
        for task in [OVERALL, *found.tasks]:
            for model in found.models:
                points = [found.interval(model, task, k) for k in ks]
                rows.append([task, model, _interval(points[0]), *(f"{100 * point.mean:.1f}" for point in points[1:])])
        header = ["task", "model", "pass@1 (95%)", *(f"pass@{k}" for k in ks[1:])]
        specs = next(iter(found.results["specs"].values()))
        text = [
            f"{found.results['suite']['description']}: {len(found.tasks)} tasks, {found.num_samples} samples of each "
            f"problem at temperature {specs['temperature']}, top-p {specs['top_p']}, "
            f"at most {specs['max_tokens']} tokens. Shaded: 95% over problems.",
            *(f"Not all the same: {difference}." for difference in found.results["differences"]),
        ]
        table = Table(name=self._name("pass_at_k", self.tables), header=header, rows=rows)
        return Section(title=self._title("pass@k"), text=text, figures=figures, tables=[table])

    def regimes(self) -> Section | None:
        found, models, k = regimes(self.evaluation), three_models(self.evaluation), self.evaluation.k
        if models is None:
            return None
        base, intermediate, final = models
        names = [*REGIMES, UNDECIDED]
        series = []
        for name in names:
            tasks = [task for task, regime in found.items() if regime.name == name]
            colour, marker = REGIME_LOOKS[name]
            if tasks:
                series.append(
                    Series(
                        label=name,
                        x=[100 * found[task].early[1] for task in tasks],
                        y=[100 * found[task].late[1] for task in tasks],
                        colour=colour,
                        marker=marker,
                        kind="points",
                        names=tasks,
                    )
                )
        figure = Figure(
            name=self._name("regimes", self.figures),
            title=f"Gain of pass@{k}, early and late (points)",
            series=series,
            xlabel=f"{intermediate} minus {base}",
            ylabel=f"{final} minus {intermediate}",
            diagonal=True,
        )
        rows = []
        for (task, regime), p in zip(found.items(), corrected(list(found.values())), strict=True):
            likeliest = min(regime.p, key=regime.p.__getitem__)
            claim = [likeliest if regime.p[likeliest] < 1.0 else "–", _p(regime.p[likeliest]), _p(p)]
            changes = (regime.early[0], regime.late[0], regime.early[1], regime.late[1])
            rows.append([task, regime.name, *(f"{100 * change:+.1f}" for change in changes), *claim])
        early, late = f"{intermediate} − {base}", f"{final} − {intermediate}"
        header = [
            *("task", "regime", f"pass@1: {early}", late, f"pass@{k}: {early}", late),
            *("likeliest", "its p", "p, Holm over tasks"),
        ]
        counts = ", ".join(f"{sum(regime.name == name for regime in found.values())} {name}" for name in names)
        text = [
            f"{counts}.",
            f"Diminished: {final} above {base} at pass@1, and below it at pass@{k}. Plateau: {intermediate} above "
            f"{base} at both, and {final} within {100 * MARGIN:g} points of {intermediate}. Sustained: {intermediate} "
            f"above {base}, and {final} above {intermediate}, at both. Each part is tested over the task's problems, "
            f"so that a task gets a wrong name with a probability of at most {LEVEL:.0%}; undecided are those of which "
            "nothing can be said, for too few problems or another course.",
        ]
        table = Table(name=self._name("regimes", self.tables), header=header, rows=rows)
        return Section(title=self._title("Regimes"), text=text, figures=[figure], tables=[table])

    def gains(self) -> Section | None:
        if len(self.evaluation.models) < 2:
            return None
        found, k = relative_gains(self.evaluation), self.evaluation.k
        first, last = self.evaluation.models[0], self.evaluation.models[-1]
        tasks = list(found.relative)
        points = Series(
            label="",
            x=[100 * found.base[task] for task in tasks],
            y=[100 * found.relative[task] for task in tasks],
            colour=COLOURS[0],
            kind="points",
            names=tasks,
        )
        figure = Figure(
            name=self._name("gain", self.figures),
            title=f"Relative gain of {last} at pass@{k} (%)",
            series=[points],
            xlabel=f"pass@{k} of {first} (%)",
            ylabel="gain (%)",
            zero=False,
        )
        never = [task for task in self.evaluation.tasks if task not in found.relative]
        text = [
            f"Relative gain is ({last} − {first}) / {first} at pass@{k}. Spearman's correlation with pass@{k} of "
            f"{first}: {_correlation(found.correlation)}; with gain and {first} from different halves of the samples, "
            f"at pass@{k // 2}: {_correlation(found.apart)}. The first is below 0 even where nothing but noise "
            "changes, for the same value stands in both; the second is free of that."
        ]
        if never:
            text.append(f"Without a relative gain, because {first} never solves them: {', '.join(never)}.")
        rows = [
            [
                task,
                f"{100 * found.base[task]:.1f}",
                f"{100 * found.final[task]:.1f}",
                f"{100 * (found.final[task] - found.base[task]):+.1f}",
                f"{100 * found.relative[task]:+.1f}%" if task in found.relative else "–",
            ]
            for task in self.evaluation.tasks
        ]
        header = ["task", f"pass@{k} of {first}", f"of {last}", "gain, points", "relative gain"]
        table = Table(name=self._name("gain", self.tables), header=header, rows=rows)
        figures = [figure] if tasks else []
        return Section(title=self._title("Gain against the base model"), text=text, figures=figures, tables=[table])

    def shift(self) -> Section:
        found = distribution_shift(self.evaluation)
        base = self.evaluation.models[0]
        edges = [10 * bin * 10 / BINS for bin in range(BINS + 1)]
        figures, rows = [], []
        for domain, models in found.items():
            series = []
            for model, shift in models.items():
                colour, _ = self.looks[model]
                shares = [100 * share for share in shift.histogram]
                series.append(Series(label=model, x=edges, y=[shares[0], *shares], colour=colour, kind="steps"))
                change = "–" if model == base else _difference(shift.change)
                rows.append(
                    [domain, model, _interval(shift.mean), change]
                    + [f"{100 * share:.1f}" for share in (shift.never, shift.always, shift.newly, shift.lost)]
                    + [f"{100 * shift.distance:.1f}"]
                )
            figures.append(
                Figure(
                    name=self._name(f"shift_{domain}", self.figures),
                    title=f"Problems by pass@1: {domain} (% of them)",
                    series=series,
                    xlabel="pass@1 (%)",
                )
            )
        header = ["domain", "model", "pass@1 (95%)", f"minus {base} (95%)", "never right", "always right"]
        header += ["newly solved", "lost", "distance"]
        note = (
            f"Shares of the problems in %; newly solved and lost against {base} in as many samples; distance is "
            f"Wasserstein's from the distribution of {base}, in points of pass@1"
        )
        table = Table(name=self._name("shift", self.tables), header=header, rows=rows, note=note)
        return Section(title=self._title("Shift of pass@1"), figures=figures, tables=[table])

    def sweeps(self) -> list[Section]:
        found, k = self.evaluation, self.evaluation.k
        parts = []
        for (family, what), points in sweeps(found).items():
            trained = [value for value, task in points if not found.tasks[task]["out_of_distribution"]]
            marks = [Mark(x=value, kind="note", colour=GREY, text="trained") for value in trained]
            figures, rows = [], []
            for tries in sorted({1, k}):
                values = [value for value, _ in points]
                series = [
                    self._curve(model, values, [found.interval(model, task, tries) for _, task in points])
                    for model in found.models
                ]
                figures.append(
                    Figure(
                        name=self._name(f"sweep_{family}_pass_at_{tries}", self.figures),
                        title=f"pass@{tries} of {family} by {what} (%)",
                        series=series,
                        xlabel=what,
                        marks=marks if len(trained) < len(points) else [],
                    )
                )
            for value, task in points:
                cells = [
                    cell
                    for model in found.models
                    for cell in (
                        _interval(found.interval(model, task, 1)),
                        f"{100 * found.interval(model, task, k).mean:.1f}",
                    )
                ]
                rows.append([f"{value:g}", "no" if found.tasks[task]["out_of_distribution"] else "yes", *cells])
            header = [what, "trained"]
            header += [cell for model in found.models for cell in (f"{model}: pass@1 (95%)", f"pass@{k}")]
            table = Table(name=self._name(f"sweep_{family}", self.tables), header=header, rows=rows)
            title = self._title(f"Difficulty of {family}")
            parts.append(Section(title=title, figures=figures, tables=[table]))
        return parts

    def outside(self) -> Section | None:
        found = out_of_distribution(self.evaluation)
        if not found:
            return None
        models = self.evaluation.models
        series = [
            self._dots(number, [_percent(row.pass_at_1[model]) for row in found.values()], list(found))
            for number, model in enumerate(models)
        ]
        figure = Figure(
            name=self._name("ood", self.figures),
            title="Out of distribution: pass@1 (%)",
            series=series,
            xlabel="pass@1",
            categories=list(found),
        )
        others = models[1:]
        header = ["task", *(f"{model}: pass@1 (95%)" for model in models)]
        header += [cell for model in others for cell in (f"{model} − {models[0]}", "p, Holm")]
        rows = [
            [name, *(_interval(row.pass_at_1[model]) for model in models)]
            + [cell for model in others for cell in (_difference(row.change[model]), _p(row.p[model]))]
            for name, row in found.items()
        ]
        table = Table(name=self._name("ood", self.tables), header=header, rows=rows)
        return Section(title=self._title("Out of distribution"), figures=[figure], tables=[table])

    def lengths(self) -> Section:
        found = lengths(self.evaluation)
        low, middle, high = (LENGTH_QUANTILES.index(share) for share in (0.25, 0.5, 0.75))
        tokens, cut = [], []
        for number, model in enumerate(self.evaluation.models):
            rows_of_model = [of_domain[model] for of_domain in found.values()]
            quartiles = [
                Interval(mean=row.quantiles[middle], low=row.quantiles[low], high=row.quantiles[high])
                for row in rows_of_model
            ]
            shares = [
                Interval(mean=share, low=share, high=share) for share in (100 * row.truncated for row in rows_of_model)
            ]
            tokens.append(self._dots(number, quartiles, list(found)))
            cut.append(self._dots(number, shares, list(found)))
        rows = []
        for domain, of_domain in found.items():
            for model, row in of_domain.items():
                means = (row.tokens, row.tokens_right, row.tokens_wrong)
                rows.append(
                    [domain, model, *("–" if mean is None else f"{mean:,.0f}" for mean in means)]
                    + [" / ".join(f"{value:,.0f}" for value in row.quantiles), f"{100 * row.truncated:.1f}%"]
                )
        domains = list(found)
        figures = [
            Figure(
                name=self._name("lengths", self.figures),
                title="Response length: median and quartiles",
                series=tokens,
                xlabel="tokens",
                categories=domains,
            ),
            Figure(
                name=self._name("truncated", self.figures),
                title="Responses cut (%)",
                series=cut,
                xlabel="%",
                categories=domains,
            ),
        ]
        header = ["domain", "model", "tokens", "of right answers", "of wrong ones"]
        header += [" / ".join(f"{share:.0%}" for share in LENGTH_QUANTILES), "cut"]
        table = Table(name=self._name("lengths", self.tables), header=header, rows=rows)
        return Section(title=self._title("Length"), figures=figures, tables=[table])

    def creativity(self, corpus: Sequence[str]) -> Section | None:
        if not corpus:
            return None
        evaluation = self.evaluation
        read = Corpus(read_corpus(corpus))
        if not read.num_words:
            raise UserError(f"--corpus: no words in {', '.join(corpus)}")
        found: dict[str, dict[str, Creativity]] = {
            model: creativity(read, first_samples(evaluation.folder / "samples" / f"{model}.jsonl"))
            for model in evaluation.models
        }
        series = []
        for model, tasks in found.items():
            colour, marker = self.looks[model]
            if shares := [100 * share for share in tasks[OVERALL].uniqueness]:
                series.append(Series(label=model, x=LENGTHS, y=shares, colour=colour, marker=marker, kind="marked"))
        figure = Figure(
            name=self._name("creativity", self.figures),
            title="L-uniqueness, mean over tasks (%)",
            series=series,
            xlabel="L, words in a row",
            top=105.0,
        )
        rows = []
        for task in [OVERALL, *evaluation.tasks]:
            for model, tasks in found.items():
                if row := tasks.get(task):
                    shown = "–" if row.index is None else _interval(row.index, 1.0, "{:.2f}")
                    at_5 = f"{100 * row.uniqueness[0]:.1f}" if row.uniqueness else "–"
                    rows.append([task, model, shown, at_5, str(row.texts), str(row.too_short)])
        header = ["task", "model", "creativity index (95%)", f"{SHORTEST}-uniqueness, %", "texts", "too short"]
        gains, base = relative_gains(evaluation), found[evaluation.models[0]]
        pairs = [
            (index.mean, gains.final[task] - gains.base[task])
            for task in evaluation.tasks
            if task in base and (index := base[task].index) is not None
        ]
        text = [
            f"Share of the words that lie in no run of L words of the corpus ({', '.join(corpus)}: {read.num_words:,} "
            f"words); the creativity index is its sum over L = {SHORTEST} to {LONGEST}, at most {len(LENGTHS)} "
            "(arXiv:2410.04265, the verbatim part). Of each problem's first sample; texts of no more than "
            f"{SHORTEST} words are left out.",
            f"Spearman's correlation of the base model's index with the gain at pass@{evaluation.k} by task: "
            f"{_correlation(spearman(pairs, seed=0))}.",
            "The index says what stands in this corpus, not what the model was trained on: against a small corpus "
            "everything looks new. Short or formal answers overlap by their form alone, and paraphrases count as new.",
        ]
        table = Table(name=self._name("creativity", self.tables), header=header, rows=rows)
        figures = [figure] if series else []
        return Section(title=self._title("Creativity index"), text=text, figures=figures, tables=[table])


def _percent(found: Interval) -> Interval:
    return Interval(mean=100 * found.mean, low=100 * found.low, high=100 * found.high)


def _interval(found: Interval | Difference, scale: float = 100.0, form: str = "{:.1f}") -> str:
    show: Callable[[float], str] = lambda value: form.format(scale * value)  # noqa: E731
    return f"{show(found.mean)} ({show(found.low)} to {show(found.high)})"


def _difference(found: Difference) -> str:
    return _interval(found, form="{:+.1f}")


def _p(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _correlation(found: Correlation | None) -> str:
    if found is None:
        return "none, for too few tasks or no difference between them"
    return f"{found.value:+.2f} (95%: {found.low:+.2f} to {found.high:+.2f}; p = {_p(found.p)}; {found.num} tasks)"
