"""A report's two pages, from groups of evaluations."""

import sys
from collections.abc import Mapping, Sequence

from fsdino.errors import Fault, UserError
from pipelines import page, panels, tables, tracking
from pipelines.tables import Group, Method, Table

PASCAL, COCO, FSS, DAVIS = "pascal-5i", "coco-20i", "fss-1000", "davis-2017"
PUBLISHED_SPLIT = "1 published"  # of FSS-1000's classes
TITLE = "Few-shot segmentation: this project's runs beside the published ones"
ABOUT = (
    "mIoU (FB-IoU) in percent, mean and standard deviation over test seeds where there are several; a dash is a cell "
    "that nothing fills. Protocols differ by points: compare rows of one protocol. Ours are marked."
)
MEASURES = {"miou": "mIoU", "empty": "rightly empty masks", "j_and_f": "J&F"}
GRID = ("prototype", "compact", "4d")


def markdown(groups: Sequence[Group]) -> str:
    """The report in Markdown."""
    parts = [f"# {TITLE}", ABOUT]
    for title, cells in sections(groups):
        parts += [f"## {title}", tables.markdown(cells)]
    parts += ["## Notes on published numbers", "\n".join(f"- {note}" for note in tables.notes((1, 2, 3, 4)))]
    return "\n\n".join(parts) + "\n"


def html(groups: Sequence[Group], tracking_uri: str) -> str:
    """The report as a page, with charts and pictures."""
    parts = [page.paragraph(ABOUT)]
    for title, cells in sections(groups):
        parts += [page.heading(title), page.table(cells)]
        group = next((g for g in groups if title == _group_title(g)), None)
        if group is not None and _measure(group) in _any(group.methods):
            parts.append(page.bars(group.methods, _measure(group), f"{MEASURES[_measure(group)]}, %"))
    grid = qualitative(groups, tracking_uri)
    if grid is not None:
        parts += [page.heading("Predictions, as in Figure 4"), grid]
    parts += [page.heading("Notes on published numbers"), page.listed(tables.notes((1, 2, 3, 4)))]
    return page.page(TITLE, parts)


def sections(groups: Sequence[Group]) -> list[tuple[str, Table]]:
    """Every table under its title: the paper's four, then each group of runs."""
    found = []
    for number, name in ((1, PASCAL), (2, COCO)):
        protocols = sorted({g.protocol for g in groups if g.dataset == name and not g.absent}) or ["hdmnet"]
        for protocol in protocols:
            one, five = (_of(groups, name, shots, protocol) for shots in ("1", "5"))
            found.append((f"{tables.title_of(number)}, {protocol}", tables.folds_table(number, one, five, protocol)))
    fss = {n: m for n, m in _of(groups, FSS, "1").items() if m.identity.get("folds") == PUBLISHED_SPLIT}
    found.append((tables.title_of(3), tables.transfer_table(fss, _of(groups, DAVIS, "1"))))
    ablated = next((name for name in (COCO, PASCAL) if _of(groups, name, "1", "hdmnet")), PASCAL)
    found.append((tables.title_of(4), tables.ablation_table(_of(groups, ablated, "1", "hdmnet"), ablated)))
    for group in groups:
        if group.absent:
            found.append((_group_title(group), tables.absent(group.title, group.methods, _folds(group))))
        elif "miou" in _any(group.methods):
            found.append((_group_title(group), tables.scores(group.title, group.methods, _folds(group))))
        else:
            found.append((_group_title(group), videos(group)))
    return found


def videos(group: Group) -> Table:
    """J, F, their recall and decay."""
    columns = ("j_and_f", "j", "j_recall", "j_decay", "f", "f_recall", "f_decay")
    table = [[group.title, *(name.replace("_and_", "&").replace("_", " ") for name in columns)]]
    for name, method in sorted(group.methods.items(), key=lambda entry: entry[1].mean("j_and_f")[0]):
        table.append([name, *(tables.percent(method.mean(column)) for column in columns)])
    return table


def qualitative(groups: Sequence[Group], tracking_uri: str) -> str | None:
    """A grid of the first test episodes: support, truth, and what each method predicts; None if no run has pictures."""
    for group in sorted(groups, key=lambda group: group.dataset != PASCAL):
        chosen = {name: group.methods[name] for name in GRID if name in group.methods}
        shared = set.intersection(*(set(m.runs) for m in chosen.values())) if len(chosen) > 1 else set()
        if group.absent or (group.ways, group.shots) != ("1", "1") or not shared:
            continue
        fold, seed = min(shared)
        try:
            pictures = {
                name: tracking.picture_of(tracking_uri, method.runs[fold, seed], "panels/test.png")
                for name, method in chosen.items()
            }
        except (Fault, UserError) as error:
            print(f"note: no pictures of {group.title}: {error}", file=sys.stderr)
            continue
        caption = f"{group.title}, fold {fold}, seed {seed}: support, truth, {', '.join(chosen)}"
        return page.picture(panels.beside(pictures), caption)
    return None


def _of(groups: Sequence[Group], name: str, shots: str, protocol: str | None = None) -> dict[str, Method]:
    """Methods on a data set, of the largest test; those that vote have rows of their own."""
    found: dict[str, Method] = {}
    for fusion, suffix in (("vote", " by vote"), ("average", ""), ("None", "")):
        comparable = [g for g in groups if not g.absent and g.ways == "1" and protocol in (None, g.protocol)]
        fitting = [g for g in comparable if (g.dataset, g.shots, g.fusion) == (name, shots, fusion)]
        if fitting:
            largest = max(fitting, key=lambda g: int(g.episodes))
            found |= {f"{method}{suffix}": of for method, of in largest.methods.items()}
    return found


def _group_title(group: Group) -> str:
    return ("Absent objects: " if group.absent else "Runs: ") + group.title


def _measure(group: Group) -> str:
    if group.absent:
        return "empty"
    return "miou" if "miou" in _any(group.methods) else "j_and_f"


def _any(methods: Mapping[str, Method]) -> dict[str, float]:
    """The measures of one evaluation."""
    method = next(iter(methods.values()))
    return next(iter(next(iter(method.folds.values())).values()))


def _folds(group: Group) -> int:
    """Number of folds that the table shows."""
    return 4 if group.dataset in (PASCAL, COCO) else 1 + max(int(f) for m in group.methods.values() for f in m.folds)
