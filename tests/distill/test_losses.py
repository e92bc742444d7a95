"""The terms of a student's loss on one batch, against the formulas on its outputs in plain numpy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_dist.config.run import Config
from rbm_dist.distill.krd import Reliability
from rbm_dist.distill.losses import Batch, Losses
from rbm_dist.distill.nosmog import adversarial_noise
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student, make_mlp, make_moe, mlp_to_rbm
from rbm_dist.moe.sparse_rows import SparseRows
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.randomness.rows import derive_keys
from rbm_dist.train.reliable_pairs import ReliablePairs
from tests.small_graph import small_store

EXPERTS, TAU = 4, 2.0
IDS = np.array([3, 100, 7, 239, 50, 51, 52, 8])
ALL = {
    "temperature": TAU, "label_weight": 0.3, "similarity": 0.7, "commitment": 0.05, "load_balance": 0.02,
    "adversarial": {"weight": 0.4, "epsilon": 0.1, "steps": 2}, "num_experts": EXPERTS, "top_k": 2,
}  # fmt: skip


def config(**student: Any) -> Config:
    soft_labels = {"hidden": True, "entropy_change": True}
    return Config.model_validate({"run_dir": "x", "soft_labels": soft_labels, "student": student})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """The small graph with all that a teacher can leave."""
    store = small_store(str(tmp_path_factory.mktemp("losses")))
    rng = np.random.default_rng(0)
    arrays = {"hidden": rng.normal(size=(240, 9)), "entropy_change": rng.random(240)}
    for name, rows in arrays.items():
        rows = rows.astype(np.float32)
        parts = [
            store.write_part(name, part, rows.dtype, rows.shape[1:], [rows[store.ids(part)]])
            for part in range(store.num_parts)
        ]
        store.publish(name, parts)
    return store


@pytest.fixture
def rbm() -> Student:
    """A routed student with dropout and batch norm, in float64."""
    mlp = make_mlp(12, 8, 5, num_layers=2, norm="batch", dropout=0.3, seed=1)
    rng = torch.Generator().manual_seed(2)
    student = mlp_to_rbm(mlp, [torch.randn(EXPERTS, width, generator=rng) for width in (12, 8)], 2).double().train()
    for parameter in student.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)
    return student


def batch_of(store: GraphStore, ids: np.ndarray = IDS, **changes: Any) -> Batch:
    label = torch.tensor([0, -1, 2, -1, 1, 1, -1, 4])[: len(ids)]
    feat, soft, hidden = (torch.from_numpy(store.gather(name, ids)).double() for name in ("feat", "soft", "hidden"))
    whole = Batch(feat, label, derive_keys(9, torch.from_numpy(ids)), soft, 2 * len(IDS), hidden)
    return replace(whole, **changes)


def softened(x: np.ndarray) -> np.ndarray:
    x = np.exp((x - x.max(axis=-1, keepdims=True)) / TAU)
    return x / x.sum(axis=-1, keepdims=True)


def values(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: term.item() for name, term in terms.items()}


def expected_terms(student: Student, batch: Batch) -> dict[str, float]:
    """Every term of plain distillation, from the student's outputs alone."""
    logits, hidden, traces = student.forward_hidden(batch.x_BF, batch.key_B)
    z, label, rows = logits.detach().numpy(), batch.label_B.numpy(), batch.global_rows
    assert batch.hidden_BT is not None
    soft, teacher = batch.soft_BC.numpy(), batch.hidden_BT.numpy()
    kl = [scipy.stats.entropy(p, q) for p, q in zip(softened(np.log(soft)), softened(z), strict=True)]
    log_q = z - np.log(np.exp(z).sum(1, keepdims=True))
    known = label >= 0
    cosines = [x @ x.T for x in (F.normalize(hidden.detach()).numpy(), F.normalize(torch.from_numpy(teacher)).numpy())]
    commitment, balance = 0.0, 0.0
    for trace in traces:
        routing = trace.routing
        a, c, e = (x.detach().numpy() for x in (routing.weights_Bk, routing.cosines_Bk, routing.experts_Bk))
        commitment -= np.sum(a * c) / rows
        mass = np.bincount(e.flatten(), a.flatten(), EXPERTS)
        balance += mass.var() / mass.mean() ** 2
    return {
        "distillation": 0.7 * TAU**2 * sum(kl) / rows,
        "label": -0.3 * log_q[known, label[known]].sum() / (label >= 0).sum(),
        "similarity": 0.7 * np.sum((cosines[0] - cosines[1]) ** 2) / rows**2,
        "commitment": 0.05 * commitment,
        "load_balance": 0.02 * balance,
    }


def test_every_term(store: GraphStore, rbm: Student) -> None:
    batch, loss = batch_of(store), Losses(config(**ALL).student, Mesh.single())
    expected = expected_terms(rbm, batch)
    statistics = [rbm.norms[0].running_mean.clone(), rbm.norms[0].running_var.clone()]
    terms, traces, more = loss(rbm, batch)
    found = values(terms)
    assert found.pop("adversarial") > 0.4 * expected["distillation"] / 0.7, "the noise does harm"
    assert found == pytest.approx(expected)
    assert len(traces) == 2
    assert torch.equal(traces[0].x_BD, batch.x_BF), "the memory averages the task's rows, not the noisy ones"
    # One forward of the task counts for the running statistics, those with noise do not.
    mean = expected_running_mean(rbm, batch, statistics[0])
    torch.testing.assert_close(rbm.norms[0].running_mean, mean)
    assert more == loss.after_epoch(0, more) == {}


def expected_running_mean(student: Student, batch: Batch, before: Tensor) -> Tensor:
    hidden, _ = student.layers[0](batch.x_BF, derive_keys(batch.key_B, 0))
    return before.lerp(hidden.detach().mean(0), 0.1)


def test_adversarial_term(store: GraphStore, rbm: Student) -> None:
    rbm.eval()  # so that a forward is a function of its rows alone
    batch = batch_of(store)
    plain = Losses(config(temperature=TAU).student, Mesh.single())

    def distillation(x: Tensor) -> Tensor:
        return plain(rbm, replace(batch, x_BF=x))[0]["distillation"]

    noise = adversarial_noise(distillation, batch.x_BF, batch.key_B, 0.1, 2)
    found, _, _ = Losses(config(**ALL).student, Mesh.single())(rbm, batch)
    assert found["adversarial"].item() == pytest.approx(0.4 * distillation(batch.x_BF + noise).item())


def test_what_has_no_weight_is_no_term(store: GraphStore, rbm: Student) -> None:
    off = {"commitment": 0.0, "load_balance": 0.0, "num_experts": EXPERTS, "top_k": 2}
    found, _, _ = Losses(config(**off).student, Mesh.single())(rbm, batch_of(store))
    assert set(found) == {"distillation"}


def test_students_without_a_memory(store: GraphStore) -> None:
    mlp = make_mlp(12, 8, 5, num_layers=2, norm="layer", dropout=0.0, seed=1)
    loss, batch = Losses(config(**ALL).student, Mesh.single()), batch_of(store)
    common = {"distillation", "label", "similarity", "adversarial"}
    assert set(loss(mlp.double(), batch)[0]) == common
    assert set(loss(make_moe(mlp, EXPERTS, 2, seed=0).double(), batch)[0]) == common | {"load_balance"}


def test_sparse_rows_have_the_same_terms(store: GraphStore, rbm: Student) -> None:
    batch = batch_of(store)
    sparse = SparseRows.of(sp.csr_array(batch.x_BF.numpy()), torch.float64)
    loss = Losses(config(**ALL).student, Mesh.single())
    found, expected = (values(loss(rbm, replace(batch, x_BF=x))[0]) for x in (sparse, batch.x_BF))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("which", ["agreeing", "all"])
def test_reliable_neighbours(store: GraphStore, rbm: Student, which: str) -> None:
    krd = {"min_update_epoch": 2, "bins": 5, "momentum": 0.5, "neighbours": which}
    settings = config(objective="krd", krd=krd, **ALL).student
    reliability = Reliability(settings.krd)
    pairs = ReliablePairs(settings.krd, store, reliability)
    loss, batch = Losses(settings, Mesh.single(), reliability), with_pairs(batch_of(store), pairs, IDS)
    expected = expected_terms(rbm, batch)
    logits = rbm(batch.x_BF, batch.key_B)[0].detach().numpy()
    links = pairs.links(IDS, 77)
    teacher_m, row_m = links.teacher_m, links.row_m
    assert len(row_m) > len(IDS)
    soft = softened(np.log(store.gather("soft", links.nodes).astype(np.float64)))
    p, q = soft[teacher_m], softened(logits)[row_m]
    kl = scipy.stats.entropy(p, q, axis=1)
    # As published a mean over pairs; else one over each row's pairs, then over the rows.
    mean = kl.mean() if which == "all" else np.mean([kl[row_m == i].mean() for i in range(len(IDS))])
    expected["distillation"] = 0.7 * TAU**2 * mean
    terms, _, more = loss(rbm, batch)
    found = values(terms)
    assert found.pop("adversarial") > 0.4 * expected["distillation"] / 0.7
    assert found == pytest.approx(expected)
    # Between epochs q is fitted to where the student agrees with its own teacher, from the configured epoch on.
    assert loss.after_epoch(1, more) == {"krd_power": 1.0}
    agrees = logits.argmax(1) == store.gather("soft", IDS).argmax(1)
    change = pairs.change(IDS)
    reference = Reliability(settings.krd)
    reference.fit(np.stack([np.histogram(each, np.linspace(0, 1, 6))[0] for each in (change, change[agrees])]))
    assert loss.after_epoch(2, more) == {"krd_power": pytest.approx(reference.power)}
    assert reliability.power != 1.0


def with_pairs(batch: Batch, pairs: ReliablePairs, ids: np.ndarray) -> Batch:
    return replace(batch, pairs=pairs.draw(ids, 77, torch.float64))


def test_neighbours_that_all_disagree_teach_nothing(tmp_path: Path) -> None:
    store = small_store(str(tmp_path))
    soft = (np.random.default_rng(0).random((240, 240)) + 240 * np.eye(240)).astype(np.float32)  # each its own class
    soft /= soft.sum(1, keepdims=True)
    parts = range(store.num_parts)
    store.publish("soft", [store.write_part("soft", p, soft.dtype, (240,), [soft[store.ids(p)]]) for p in parts])
    mlp = make_mlp(12, 8, 240, num_layers=2, norm="layer", dropout=0.0, seed=1).double()
    settings = config(temperature=TAU).student
    reliability, feat = Reliability(settings.krd), torch.from_numpy(store.gather("feat", IDS)).double()
    own = Batch(feat, torch.full((8,), -1), torch.from_numpy(IDS), torch.from_numpy(soft[IDS]).double(), len(IDS))
    gradients, found = [], []
    for teaching in (None, reliability):
        batch = with_pairs(own, ReliablePairs(settings.krd, store, teaching), IDS) if teaching else own
        loss = Losses(settings, Mesh.single(), teaching)(mlp, batch)[0]["distillation"]
        found.append(loss)
        gradients.append(torch.autograd.grad(loss, list(mlp.parameters())))
    assert store.sample(IDS, (-1,), 0).edges_per_hop[0] > 50, "there are neighbours"
    torch.testing.assert_close(found[1], found[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-15)


def test_a_rank_without_rows(store: GraphStore, rbm: Student) -> None:
    loss, none = Losses(config(**ALL).student, Mesh.single()), batch_of(store, IDS[:0])
    terms, _, _ = loss(rbm, none)
    assert values(terms) == pytest.approx(dict.fromkeys(terms, 0.0), abs=1e-12)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None or not p.grad.isnan().any() for p in rbm.parameters())


def test_shares_of_rows_add_up(store: GraphStore, rbm: Student) -> None:
    rbm.eval()
    # The other terms ask all ranks for more than the number of their rows.
    settings = {
        name: value for name, value in ALL.items() if name not in ("similarity", "load_balance", "label_weight")
    }
    loss = Losses(config(**settings, load_balance=0.0).student, Mesh.single())
    whole = batch_of(store)
    parts = []
    for rows in (slice(0, 3), slice(3, 8)):
        each = {name: getattr(whole, name)[rows] for name in ("x_BF", "label_B", "key_B", "soft_BC", "hidden_BT")}
        parts.append(values(loss(rbm, replace(whole, **each))[0]))
    expected = values(loss(rbm, whole)[0])
    assert {name: sum(part[name] for part in parts) for name in expected} == pytest.approx(expected)
