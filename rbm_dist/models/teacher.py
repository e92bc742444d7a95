"""The teacher that a configuration asks for."""

from rbm_dist.config.run import Config
from rbm_dist.models.gnn import Gnn, seeded
from rbm_dist.models.hop_networks import HopNetwork, Sagn, Sgc, Sign

Teacher = Gnn | HopNetwork


def build_teacher(config: Config, num_features: int, num_classes: int) -> Teacher:
    """The untrained teacher of a configuration; equal on every rank. Raises `InputError`, see `make_conv`."""
    teacher, sizes = config.teacher, (num_features, config.teacher.hidden, num_classes)
    if teacher.model == "sgc":
        return seeded(config.seed, lambda: Sgc(num_features, num_classes))
    if teacher.reads_hops:
        kind = Sign if teacher.model == "sign" else Sagn
        return seeded(config.seed, lambda: kind(*sizes, teacher.hops, teacher.dropout, teacher.norm))
    arguments = {"heads": teacher.heads} if teacher.conv in ("gat", "gatv2") else teacher.arguments.model_dump()
    return seeded(
        config.seed,
        lambda: Gnn(
            *sizes,
            len(teacher.fanout),
            teacher.dropout,
            teacher.norm,
            teacher.conv,
            arguments,
            teacher.residual,
            teacher.jumping_knowledge,
        ),
    )
