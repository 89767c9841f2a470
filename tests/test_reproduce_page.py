"""The results page: claims only beyond the spread, every seed shown, nothing printed that was not run."""

import csv
import json
import re
from pathlib import Path

import pytest
from extras import needs

needs("scipy", "matplotlib")

import coefficients
import page
import section_table7
from claims import NOISE, ONE_SEED, Claim, adjusted_p_values, verdict
from comparison import Difference, PooledVariance, compare, compare_counts, pool
from networks import NETWORKS
from scipy.stats import t
from section_starts import starts

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
GPU = ROOT / "benchmarks" / "results" / "gpu"
FIELDS = (
    "network augmented seed epochs train_images test_images parameters fit_loss fit_error test_error seconds diverged"
)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run(network, seed, error, diverged=0, augmented=1):
    values = [network, augmented, seed, 10, 16000, "all", 853018, error / 100, error, error, 60.0, diverged]
    row = dict(zip(FIELDS.split(), values))
    if diverged:
        row.update(dict.fromkeys(("fit_loss", "fit_error", "test_error"), ""))
    return row


def written(folder):
    page.write(folder, folder / "page.md")
    return (folder / "page.md").read_text(encoding="utf-8")


def figure(folder, name):
    """Return the axes of a figure."""
    return page.compose(folder, folder / "page.md")[1][name].axes


def drawn(axes, side="xdata"):
    """Return what is drawn, line by line."""
    return [list(getattr(line, f"get_{side}")()) for line in axes.lines]


def line(text, start):
    """Return the cells of the first row that starts so: test errors stand above training losses."""
    found = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def seeds(*values):
    """Return values by seed."""
    return {str(seed): value for seed, value in enumerate(values)}


def word(result):
    """Return the verdict of a comparison that is alone on its page."""
    claim = Claim("setting", "ours", "peer", "test error", result)
    return verdict(claim, adjusted_p_values([claim]))


def test_three_common_seeds_are_compared_in_pairs():
    """Mean of the differences ± Student's t times s / √3; what both networks share with a seed cancels."""
    result = compare(seeds(1.0, 12.0, 23.0), seeds(2.0, 14.0, 26.0), PooledVariance(100.0, 4))
    assert result.value == pytest.approx(-2)
    half = t.ppf(0.975, 2) / 3**0.5
    assert result.interval == pytest.approx((-2 - half, -2 + half))
    assert result.p == pytest.approx(2 * t.sf(2 * 3**0.5, 2))
    other = compare({**seeds(2.0, 14.0, 26.0), "7": 0.0}, {**seeds(1.0, 12.0, 23.0), "8": 99.0}, PooledVariance(1.0, 4))
    assert other.value == pytest.approx(2)
    assert other.interval == pytest.approx((2 - half, 2 + half))


def test_two_seeds_take_the_spread_of_all_networks():
    """s² (1 / n_a + 1 / n_b), s² pooled over networks with (1 + 2 + 0) degrees of freedom."""
    pooled = pool([[1.0, 3.0], [1.0, 2.0, 3.0], [5.0]])
    assert pooled == (pytest.approx(4 / 3), 3)
    result = compare(seeds(1.0, 3.0), {"5": 11.0, "6": 12.0}, pooled)
    half = t.ppf(0.975, 3) * (4 / 3) ** 0.5
    assert result.value == -9.5
    assert result.interval == pytest.approx((-9.5 - half, -9.5 + half))
    assert result.p == pytest.approx(2 * t.sf(9.5 / (4 / 3) ** 0.5, 3))


@pytest.mark.parametrize(
    ("ours", "peers", "expected"),
    [
        ((20.0, 21.0, 22.0), (21.0, 20.0, 23.0), NOISE),
        ((20.0,), (30.0, 30.1), ONE_SEED),
        ((20.0, 20.0), (20.0, 20.0), NOISE),
        ((20.0, 20.0), (21.0, 21.0), "lower"),
        ((21.0, 22.0, 23.0), (20.0, 21.0, 22.0), "higher"),
    ],
)
def test_a_difference_within_the_spread_is_no_claim(ours, peers, expected):
    assert word(compare(seeds(*ours), seeds(*peers), pool([ours, peers]))) == expected


def test_a_claim_survives_the_number_of_claims():
    """Benjamini and Hochberg: the k-th smallest of m p-values must be at most 0.05 k / m."""
    p_values = [0.01, 0.02, 0.03, 0.045, 0.3]
    claims = [
        Claim("setting", f"net {p}", "peer", "test error", Difference(-1.0, (-2.0, 0.0), p)) for p in p_values
    ] + [Claim("setting", "alone", "peer", "test error", Difference(-1.0))]
    adjusted = adjusted_p_values(claims)
    words = [verdict(claim, adjusted) for claim in claims]
    assert words == ["lower"] * 3 + ["lower, before correction", NOISE, ONE_SEED]


def test_a_win_within_the_spread_is_noise_and_one_beyond_it_is_a_claim(tmp_path):
    rows = [run("resnet56", s, e) for s, e in enumerate((25.0, 27.0, 29.0))]
    rows += [run("hbnet56", s, e) for s, e in enumerate((25.0, 26.0, 27.0))]
    rows += [run("resnet20", s, e) for s, e in enumerate((30.0, 30.1, 30.2))]
    rows += [run("hbnet20", s, e) for s, e in enumerate((28.1, 28.0, 28.2))]
    write_csv(tmp_path / "table4.csv", rows)
    text = written(tmp_path)
    assert line(text, "HBNet-56 − ResNet-56")[1:] == ["+0.14", "-1.00 [-3.48, +1.48]", "0.23", NOISE, NOISE]
    assert line(text, "HBNet-20 − ResNet-20")[1:] == ["", "-2.00 [-2.25, -1.75]", "0.00083", "lower", ""]
    agrees, found, noise = (
        text.index(f"**{title}") if f"**{title}" in text else None
        for title in ("Agrees", "Decided, where the paper prints nothing", "Not decided")
    )
    assert agrees is None
    assert found < text.index("- HBNet-20 against ResNet-20, test error") < noise
    assert noise < text.index("- HBNet-56 against ResNet-56, test error")
    assert line(text, "HBNet-56")[1:4] == ["853,018", "5.46", "26.00 ± 1.00"]
    axes = figure(tmp_path, "table4")[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["ResNet-20", "HBNet-20", "ResNet-56", "HBNet-56"]
    assert drawn(axes)[4:] == [[25.0, 27.0, 29.0], [27.0], [25.0, 26.0, 27.0], [26.0]]


def test_a_network_has_its_line_in_all_panels(tmp_path):
    rows = [run("resnet20", 0, 30.0), run("resnet56", 0, 25.0), run("resnet56", 0, 45.0, augmented=0)]
    write_csv(tmp_path / "table4.csv", rows)
    panels = figure(tmp_path, "table4")
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["ResNet-20", "ResNet-56"]
    assert drawn(panels[1]) == [[45.0], [45.0]]
    assert drawn(panels[1], "ydata") == drawn(panels[0], "ydata")[2:]
    assert panels[0].get_xlim() == panels[1].get_xlim()


@pytest.mark.parametrize(("error", "sign"), [(20.0, "does not agree"), (30.0, "agrees")])
def test_agreement_is_about_the_papers_sign(tmp_path, error, sign):
    """With augmentation and n = 9 the paper's HBNet has the larger error, by 0.14."""
    rows = [run("resnet56", s, 25 + s / 10) for s in range(3)] + [run("hbnet56", s, error + s / 10) for s in range(3)]
    write_csv(tmp_path / "table4.csv", rows)
    text = written(tmp_path)
    assert line(text, "HBNet-56 − ResNet-56")[5] == sign
    assert ("**Agrees" in text) == (sign == "agrees")
    assert ("**Does not agree" in text) == (sign != "agrees")


def test_a_missing_seed_and_a_diverged_run_are_shown(tmp_path):
    rows = [run("resnet20", s, 30.0 + s) for s in (0, 2)] + [run("hbnet20", s, 28.0 + s) for s in (0, 1)]
    rows.append(run("hbnet20", 2, 0.0, diverged=1))
    write_csv(tmp_path / "table4.csv", rows)
    text = written(tmp_path)
    assert line(text, "ResNet-20")[-1] == "0, 2 (not run: 1)"
    assert line(text, "HBNet-20")[-1] == "0, 1, 2 (diverged: 2)"
    assert line(text, "HBNet-20")[3] == "28.50 ± 0.71"
    assert "without runs that diverged" in text


def test_one_seed_claims_nothing(tmp_path):
    write_csv(tmp_path / "table4.csv", [run("resnet20", 0, 30.0), run("hbnet20", 0, 10.0)])
    text = written(tmp_path)
    assert line(text, "HBNet-20 − ResNet-20")[1:] == ["-20.00", "", ONE_SEED]
    assert "Comparisons with several seeds: 0. " in text
    assert "Left out with a single seed: 1." in text
    assert not re.search(r"\*\*(Agrees|Does|Decided|Significant|Not)", text)


def test_other_recipes_are_other_blocks(tmp_path):
    rows = [run("resnet20", 0, 30.0), run("hbnet20", 0, 20.0, augmented=0)]
    write_csv(tmp_path / "table4.csv", rows)
    text = written(tmp_path)
    assert "HBNet-20 − ResNet-20" not in text
    assert text.count("### 16,000 images, 10 epochs, with") == 2


def test_all_images_and_fewer_test_images_have_their_blocks(tmp_path):
    full = dict(run("hbnet20", 0, 20.0), train_images="all", epochs=300)
    write_csv(tmp_path / "table4.csv", [full, dict(run("hbnet20", 0, 30.0), test_images=64)])
    text = written(tmp_path)
    assert "### all images, 300 epochs, with augmentation\n" in text
    assert "### 16,000 images, 10 epochs, with augmentation, 64 test images\n" in text
    assert "on all test images" in text


def test_rows_in_any_order_make_one_page(tmp_path):
    """Two processes add their rows as they finish."""
    rows = [run(name, s, e + s) for s in range(3) for name, e in (("resnet56", 30), ("hbnet56", 20))]
    rows.append(run("hbnet56", 3, 0.0, diverged=1))
    write_csv(tmp_path / "table4.csv", rows)
    text = written(tmp_path)
    write_csv(tmp_path / "table4.csv", rows[::-1])
    assert written(tmp_path) == text


def test_links_go_from_the_page_to_the_results(tmp_path):
    results = tmp_path / "found" / "here"
    results.mkdir(parents=True)
    write_csv(results / "table4.csv", [run("resnet20", 0, 30.0)])
    page.main(["--results", str(results)])
    text = (tmp_path / "found" / "here.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!http|#)([^)]+)\)", text)
    assert len(targets) == 3
    for target in targets:
        assert (tmp_path / "found" / target).resolve().exists(), target


def test_what_was_not_run_is_not_printed(tmp_path):
    write_csv(tmp_path / "table4.csv", [run("resnet20", 0, 30.0)])
    text = written(tmp_path)
    assert "HBNet-20" not in text
    assert not re.search(r"^## (Stability|Learned|Table 5|Table 7|Conclusions)", text, re.MULTILINE)
    assert [path.name for path in tmp_path.glob("*.png")] == ["table4.png"]


def test_stability(tmp_path):
    fields = ("network", "seed", "steps", "lr", "last_loss", "largest_grad_norm", "diverged")
    rows, curves = [], []
    for network, losses in (("resnet110", ("2.4", "2.3", "")), ("hbnet110", ("1.70", "1.71", "1.72"))):
        for seed, loss in enumerate(losses):
            rows.append(dict(zip(fields, (network, seed, 200, 0.1, loss, "12.5", int(not loss)))))
            budget = dict(network=network, seed=seed, steps=200, lr=0.1)
            curves += [dict(budget, step=i, loss=2.3, grad_norm=1 + i) for i in range(12)]
    write_csv(tmp_path / "stability.csv", rows)
    write_csv(tmp_path / "stability_curves.csv", curves)
    text = written(tmp_path)
    assert line(text, "ResNet-110")[1:] == ["3", "1", "2.35 ± 0.07", "12.5", "0, 1, 2"]
    assert line(text, "HBNet-110")[1:3] == ["3", "0"]
    losses, norms = figure(tmp_path, "stability")
    assert drawn(losses, "ydata") == [pytest.approx([2.3] * 12)] * 12
    each, mean_of_ten = drawn(norms, "ydata")[:2]
    assert (len(drawn(norms)), each) == (12, [1.0 + i for i in range(12)])
    assert mean_of_ten[:2] + mean_of_ten[-1:] == [1.0, 1.5, 7.5]


def test_the_map_has_a_network_per_line_and_a_rate_per_column(tmp_path):
    fields = ("network", "seed", "steps", "lr", "last_loss", "largest_grad_norm", "diverged")
    runs = [
        ("hbnet20", 0, 100, 0.3, "1.50", "9", 0),
        ("hbnet20", 1, 100, 0.3, "1.70", "9", 0),
        ("hbnet20", 0, 100, 1.0, "", "9", 1),
        ("hbnet20", 1, 100, 1.0, "2.00", "9", 0),
        ("hbnet56", 0, 100, 1.0, "", "9", 1),
    ]
    write_csv(tmp_path / "stability.csv", [dict(zip(fields, run)) for run in runs])
    text = written(tmp_path)
    assert line(text, "100 steps, measured")[1:] == ["at 0.3", "at 1.0", "seeds"]
    assert line(text, "HBNet-20")[1:] == ["1.60", "1 of 2 diverge", "0, 1"]
    assert line(text, "HBNet-56")[1:] == ["", "diverges", "0"]
    assert "last loss (100" not in text


@pytest.mark.parametrize(
    ("ours", "peers", "expected"),
    [((5, 5), (0, 5), "more"), ((0, 3), (5, 5), "fewer"), ((3, 3), (0, 3), NOISE), ((0, 5), (0, 5), NOISE)],
)
def test_counts_are_compared_by_fishers_exact_test(ours, peers, expected):
    """With fixed margins, k of n against none of m has the probability 1 / C(n + m, k), twice that where n = m."""
    found = compare_counts(*([i < hits for i in range(runs)] for hits, runs in (ours, peers)))
    assert word(found) == expected
    assert found.to_text() == f"{ours[0]} of {ours[1]} against {peers[0]} of {peers[1]}"


@pytest.mark.parametrize(
    ("hbnet", "resnet", "title"), [(5, 0, "Does not agree"), (0, 5, "Agrees"), (1, 0, "Not decided")]
)
def test_the_paper_has_fewer_runs_of_hbnet_diverge(tmp_path, hbnet, resnet, title):
    rows = []
    for network, lost in (("resnet110", resnet), ("hbnet110", hbnet)):
        for seed in range(5):
            row = dict(network=network, seed=seed, steps=200, lr=0.1)
            diverged = int(seed < lost)
            loss = "" if diverged else 1 + seed / 100
            rows.append(dict(row, last_loss=loss, largest_grad_norm=9, diverged=diverged))
    write_csv(tmp_path / "stability.csv", rows)
    text = written(tmp_path)
    claim = "- HBNet-110 against ResNet-110, runs that diverge (200 steps at 0.1): "
    said = text[text.index(f"**{title}") :].split("**")[2]
    assert claim in said
    assert f"{hbnet} of 5 against {resnet} of 5" in said
    assert ("last loss" in text.split("## Stability")[0]) == (max(hbnet, resnet) < 5)


def test_gradients(tmp_path):
    names = ("first_norm", "last_norm", "largest_norm", "smallest_norm")
    rows = [
        {"network": "hbnet20-auto", "seed": seed, "batch_size": 64, "transforms": 9, **dict(zip(names, norms))}
        for seed, norms in enumerate([(2, 1, 4, 1), (4, 1, 6, 1)])
    ]
    write_csv(tmp_path / "gradients.csv", rows)
    write_csv(tmp_path / "table5.csv", [dict(name="none")])
    text = written(tmp_path)
    assert line(text, "HBNet-20, γ by the rule")[1:] == ["9", "3.0 ± 1.4", "5.0 ± 1.4", "0, 1"]


def test_searches(tmp_path):
    budget = dict.fromkeys((*section_table7.BUDGET, "test_images"), 4)
    rows = []
    found = [("darts", (40.0, 41.0), 100), ("agd", (39.0, 42.0), 150), ("hb", (20.0, 20.1), 50)]
    for method, errors, seconds in [*found, ("agd-warm-up", (30.0, 31.0), 150)]:
        for seed, error in enumerate(errors):
            names = dict(method=method, seed=seed, genotype=f"cifar10_{method}_seed{seed}", parameters=1000 + seed)
            counts = dict(normal_edges=8, normal_poolings=seed)
            speed = 1 + 2 * seed  # the second seed's machine is slower
            times = dict(search_seconds=seconds * speed, darts_seconds=100 * speed)
            rows.append({**names, **budget, **counts, "test_error": error, **times})
    write_csv(tmp_path / "table7.csv", rows)
    text = written(tmp_path)
    measured = ["20.05 ± 0.07", "2.92M", "1,000, 1,001", "0.75", "0.50 ± 0.00", "1 of 16", "0, 1"]
    assert line(text, "HB space")[1:] == ["2.82", *measured, "`cifar10_hb_seed0`, `cifar10_hb_seed1`"]
    assert line(text, "AGD space − DARTS space")[1::3] == ["-0.44", NOISE]
    assert line(text, "AGD space, α frozen at first − DARTS space")[1::3] == ["", "lower"]
    assert "random search" not in text
    assert "; 4 test images" in text
    (axes,) = figure(tmp_path, "table7")
    assert drawn(axes)[:4] == [[40.0, 41.0], [40.5], [20.0, 20.1], [20.05]]


def coefficient(seed, layer, name, index, value):
    recipe = dict(
        network="hbnet20-learn-beta", augmented=1, seed=seed, epochs=10, train_images=16000, test_images="all"
    )
    return {**recipe, "layer": layer, "coefficient": name, "index": index, "value": value}


def test_alpha_is_summed_up_by_how_near_its_source_is():
    """α_{k+1,j}, j = 0 … k: source 0 is the block's input, which the first layer has alone, and k the layer before."""
    values = [(1, 0, 0.9), (2, 0, 0.5), (2, 1, 1.3), (3, 0, 0.1), (3, 1, 1.0), (3, 2, 1.5)]
    rows = [coefficient(0, f"features.denseblock1.denselayer{k}.conv1", "alpha", j, a) for k, j, a in values]
    table = coefficients.summary([{k: str(v) for k, v in row.items()} for row in rows])[2:]
    assert [[cell.strip() for cell in text.split("|")[2:6]] for text in table] == [
        ["α of the block's input", "1", "0.500", "0.10 … 0.90"],
        ["α of the layer before", "1", "1.400", "1.30 … 1.50"],
        ["α of other layers", "1", "1.000", "1.00 … 1.00"],
    ]


def test_coefficients_by_depth(tmp_path, capsys):
    rows = [
        coefficient(s, f"layer{i}", "beta2", k, -1 + s / 2 + i / 10) for s in (0, 1) for i in (1, 2) for k in (1, 2)
    ]
    write_csv(tmp_path / "coefficients.csv", rows)
    places = coefficients.by_place([{k: str(v) for k, v in row.items()} for row in rows])["beta2"]
    assert places["layer1", 1] == places["layer1", 2] == pytest.approx([-0.9, -0.4])
    assert places["layer2", 2] == pytest.approx([-0.8, -0.3])
    coefficients.main(["--results", str(tmp_path)])
    label = "HBNet-20, β learned: 16,000 images, 10 epochs, augmented"
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"| {label} | β2 of stage 1 | -1 | -0.650 | -0.90 … -0.40 | 2 |",
        f"| {label} | β2 of stage 2 | -1 | -0.550 | -0.80 … -0.30 | 2 |",
    ]
    (axes,) = figure(tmp_path, "coefficients")
    assert drawn(axes, "ydata")[0] == pytest.approx([-0.65, -0.65, -0.55, -0.55])
    assert sorted(drawn(axes, "ydata")[1:5]) == [pytest.approx(v) for v in 2 * [[-0.9, -0.4]] + 2 * [[-0.8, -0.3]]]
    assert (tmp_path / "coefficients.png").exists()


@pytest.mark.parametrize("main", [page.main, coefficients.main])
def test_a_folder_without_results_is_refused(main, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--results", str(tmp_path)])
    assert f"argument --results: {tmp_path}" in capsys.readouterr().err


def test_starts_have_each_seed_and_a_verdict_only_with_several(tmp_path):
    recipe = "20,000 images, 8 epochs, bfloat16"
    fields = dict(recipe=recipe, quantity="test error", device="NVIDIA H100 80GB", finite=True, note="")
    errors = {
        ("HBNet-56", "1"): (29.0, 29.5),
        ("HBNet-56", "rule"): (20.0, 21.0),
        ("HBNet-20", "1"): (23.0, 24.0),
        ("HBNet-20", "rule"): (24.0,),
    }
    rows = [
        dict(fields, model=model, start=start, lr=0.1, seed=seed, value=value)
        for (model, start), values in errors.items()
        for seed, value in enumerate(values)
    ]
    rows += [
        dict(fields, model="HBNet-56", start="rule", lr=0.05, seed=seed, value=value)
        for seed, value in enumerate((22.5, 23.5))
    ]
    rows.append(dict(fields, model="HBNet-20", start="0.1", lr=0.1, seed=0, value=""))  # left out
    rows.append(dict(fields, model="HBNet-20", start="0.03", lr=0.1, seed=0, value=90.0, finite=False))
    write_csv(tmp_path / "cifar10.csv", rows)
    write_csv(tmp_path / "table4.csv", [run("hbnet20", 0, 20.0)])
    text, _ = page.compose(tmp_path, tmp_path / "page.md", tmp_path)
    assert line(text, "HBNet-56 | 1") == ["HBNet-56", "1", "0.1", "29.25 ± 0.35", "0, 1"]
    assert line(text, "HBNet-20 | rule")[2:] == ["0.1", "24.00", "0"]
    assert line(text, "20") == ["20", "23.50 ± 0.71", "24.00", "", ""]
    assert line(text, "56") == ["56", "29.25 ± 0.35", "20.50 ± 0.71", "", ""]  # 0.05 is another table's
    assert "| 110 |" not in text
    assert line(text, "HBNet-56 | rule | 0.05")[3:] == ["23.00 ± 0.71", "0, 1"]
    assert line(text, "HBNet-56, γ = rule, at 0.05 − HBNet-56, γ = rule")[1].startswith("+2.50 [")
    assert "| HBNet-20 | 0.1 |" not in text
    assert line(text, "HBNet-20 | 0.03")[2:] == ["0.1", "", "0 (diverged: 0)"]
    assert line(text, "HBNet-56, γ = rule − HBNet-56, γ = 1")[3] == "lower"
    assert line(text, "HBNet-20, γ = rule − HBNet-20, γ = 1")[1:] == ["+0.50", "", ONE_SEED]
    assert "## Starts" not in written(tmp_path)
    repeated = dict(rows[0], quantity="test error, repeated", value=28.0, device="x86_64")
    added = dict(rows[0], seed=2, device="x86_64", note="added after seeds 0 and 1")
    longer = [dict(row, recipe="50,000 images, 16 epochs", value=row["value"] - 9) for row in rows[:2]]
    small = [dict(rows[0], start="0.1", seed=seed, finite=seed < 2) for seed in range(3)]
    write_csv(tmp_path / "cifar10.csv", [*rows, added, repeated, *longer, *small])
    text, _ = page.compose(tmp_path, tmp_path / "page.md", tmp_path)
    assert line(text, "HBNet-56 | 1")[4] == "0, 1 (H100); 2 (x86_64)"
    assert line(text, "HBNet-20 | rule")[4] == "0 (H100)"
    first, second = text.split(f"### {recipe}\n")[1].split("### 50,000 images, 16 epochs\n")
    assert "HBNet-56, γ = 1, seed 0, was repeated on x86_64, and ended at 28.00 instead of 29.00." in first
    assert "HBNet-56, γ = 1, seed 2, was added after seeds 0 and 1." in first
    assert line(second, "HBNet-56 | 1")[3:] == ["20.25 ± 0.35", "0, 1 (H100)"]  # no mean over recipes
    assert f"HBNet-56, γ = 0.1 against HBNet-56, γ = rule, test error ({recipe}, without runs that diverged)" in text
    assert f"HBNet-56, γ = rule against HBNet-56, γ = 1, test error ({recipe})" in text
    assert "was added" not in second
    assert "was repeated" not in second


@pytest.mark.parametrize("name", ["table4", "stability", "table7", "table5", "coefficients", "gradients", "cifar10"])
def test_a_file_that_lacks_a_column_is_named(name, tmp_path):
    """Files of earlier versions lack columns: to read one is an error that names it, and no KeyError."""
    rows, found = page.read_rows((GPU if name == "cifar10" else RESULTS) / f"{name}.csv")[:3], {}
    for column in rows[0]:
        write_csv(tmp_path / f"{name}.csv", [{key: row[key] for key in row if key != column} for row in rows])
        try:
            for section in (*page.SECTIONS, starts):
                section(tmp_path)
        except ValueError as error:
            found[column] = str(error)
    assert len(found) >= 4
    for column, message in found.items():
        assert message == f"{tmp_path / name}.csv: has no field {column!r}, which files of this version have"


def test_every_row_names_the_arguments_of_its_network():
    for row in page.read_rows(RESULTS / "table4.csv"):
        network = NETWORKS[row["network"]]
        assert (row["model"], json.loads(row["options"])) == (network.model, json.loads(json.dumps(network.kwargs)))
        if row["model"].startswith("hbnet"):
            assert row["model"].endswith("_resnet") or "init_last" in network.kwargs


def test_the_page_is_that_of_the_files():
    document = RESULTS.parent / "results.md"
    text, figures = page.compose(RESULTS, document, GPU)
    assert document.read_text(encoding="utf-8") == text
    assert all((RESULTS / f"{name}.png").exists() for name in figures)


def test_the_readmes_summary_is_that_of_the_files(tmp_path):
    readme = RESULTS.parents[1] / "README.md"
    copy = tmp_path / "README.md"
    copy.write_bytes(readme.read_bytes())
    page.write_summary(RESULTS, copy, GPU)
    assert copy.read_text(encoding="utf-8") == readme.read_text(encoding="utf-8")


def test_the_summary_has_the_decided_claims(tmp_path):
    """Those with a figure in the paper; the start from 1/√n is neither in the paper nor the default."""
    errors = dict(resnet56=30, hbnet56=20, hbnet20=10) | {"resnet56-small-init": 10}
    write_csv(tmp_path / "table4.csv", [run(name, s, e + s) for name, e in errors.items() for s in (0, 1)])
    document = tmp_path / "document.md"
    document.write_text(f"before\n{page.BEGIN}old\n{page.END}after\n")
    page.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md"), "--readme", str(document)])
    lines = document.read_text(encoding="utf-8").splitlines()
    before, _, count, _, title, _, heading, claim, _, default, _, after = lines
    assert (before, after) == ("before", "after")
    assert count == "Comparisons with several seeds: 2; decided, after the correction for their number: 2."
    assert title == "With a figure in the paper (γ = 1):"
    assert heading.startswith("- test error (16,000 images, 10 epochs")
    assert claim.startswith("  - HBNet-56 against ResNet-56: lower")
    assert claim.endswith("lower, -10.00 [-11.96, -8.04]; paper: +0.14")
    assert default.endswith("(γ by the rule if none is named): none.")
    document.write_text("no marks")
    with pytest.raises(ValueError, match=r"document.md: must have <!-- results: begin --> and <!-- results: end -->"):
        page.write_summary(tmp_path, document)


def test_the_pages_links_point_at_files():
    text = (RESULTS.parent / "results.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (RESULTS.parent / target).exists(), target
