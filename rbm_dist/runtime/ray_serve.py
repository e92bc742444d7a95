"""The server of `rbm-dist serve` as replicas under Ray Serve, whose configuration names `…runtime.ray_serve:students`.

Each replica loads all models and watches their folders on its own. How many there are, and when there are more, is Ray
Serve's configuration (`deployments`); what is here are defaults. See cluster/kuberay/rayservice.yaml.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from rbm_dist.runtime.cluster import ONE_THREAD
from rbm_dist.serve.around import Around, State, log
from rbm_dist.serve.http import Limits, application
from rbm_dist.serve.metrics import Metrics
from rbm_dist.serve.repository import Repository
from rbm_dist.serve.server import token_of

# Ray Serve's default of 5 would leave the engine waiting for the network, and nothing for a batch to be made of.
MAX_ONGOING = 64


class Settings(BaseModel):
    """The `args` of the application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, str] = Field(min_length=1, description="folders of exported students, by name; any fsspec URLs")
    engine: Literal["auto", "native", "onnx"] = "auto"
    max_body: int = Field(8 << 20, gt=0)
    max_rows: int = Field(4096, gt=0)
    without_token: bool = Field(False, description="serve without RBM_DIST_SERVE_TOKEN in the replicas' environment")


@serve.deployment(
    name="students",
    max_ongoing_requests=MAX_ONGOING,
    max_queued_requests=256,  # per proxy; more are answered with 503
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": MAX_ONGOING / 2},
    graceful_shutdown_timeout_s=20,
    health_check_period_s=5,
    ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": ONE_THREAD}},
)
@serve.ingress()
class Students:
    """One replica. It takes requests once all of its models are warm."""

    def __init__(self, settings: Settings):
        """Raises `InputError` for models that cannot be loaded, or without a token: Ray Serve then says so."""
        self._settings = settings
        self._token = token_of("a replica", settings.without_token)
        self._metrics = Metrics()
        folders = [f"{name}={url}" for name, url in settings.models.items()]
        self._repository = Repository(folders, settings.engine, self._metrics, log)

    def __serve_build_asgi_app__(self) -> Around:
        # Ray Serve bounds the requests at once, by `max_ongoing_requests`.
        limits = Limits(self._settings.max_body, self._settings.max_rows, max_waiting=1 << 20)
        return application(self._repository, self._metrics, State(), limits, self._token)


def students(args: Settings) -> Any:
    """The application, as Ray Serve builds it."""
    return Students.bind(args)  # type: ignore[attr-defined]
