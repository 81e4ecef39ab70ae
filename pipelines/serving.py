"""The service that `serve` starts, as a Ray Serve application: photographs in over HTTP, masks out.

Photographs that wait at the same time go through the encoder in one batch.
"""

import asyncio
import io
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from ray import serve

from fsdino.errors import UserError, first_line
from fsdino.preprocess import image_of
from pipelines import checkpoints, cli, heap, outputs
from pipelines.examples import Examples, registered
from pipelines.serve import Settings, checked_classes

if TYPE_CHECKING:
    from PIL import Image

    from fsdino.predictor import ClassEncoding

MOST_BYTES, MOST_PIXELS, MOST_CLASS_BYTES = 64 << 20, 50_000_000, 256 << 20
BODY, BODY_SECONDS = "the request's body", 30
BATCH_WAIT_S = 0.005
ERROR = {"content": {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}}}
DOCUMENTED: dict[str, Any] = {
    "openapi_extra": {
        "requestBody": {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}, "required": True}
    },
    "responses": {
        400: {"description": "The body is not an image, or has too many pixels.", **ERROR},
        408: {"description": "The body took too long to arrive.", **ERROR},
        413: {"description": "The body has too many bytes.", **ERROR},
        503: {"description": "Too many photographs wait already."},
    },
}

api = FastAPI(title="FS-DINO", description="Masks of registered classes in photographs.")


class RefusedRequest(UserError):
    """A request that gets another status than 400."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


@api.exception_handler(UserError)
def refuse(request: Request, error: UserError) -> JSONResponse:
    """What is wrong with a request, in one line."""
    return JSONResponse({"error": first_line(error)}, getattr(error, "status", 400))


async def read_photograph(request: Request) -> "Image.Image":
    """The photograph in the body. Raises UserError if it is none, or too large."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise RefusedRequest(413, f"{BODY}: expected at most {MOST_BYTES >> 20} MiB, got more")
    except TimeoutError:
        raise RefusedRequest(408, f"{BODY}: expected all of it within {BODY_SECONDS} s") from None
    return await asyncio.to_thread(image_of, bytes(body), BODY, MOST_PIXELS)


def as_json(found: outputs.Found, names: Sequence[str], instances: bool) -> dict[str, Any]:
    """What `/segment` answers."""
    classes = []
    for name, score, mask, logits in zip(names, found.scores, found.masks, found.logits, strict=True):
        objects = [outputs.coco_record(*part, logits) for part in outputs.parts(mask, instances)]
        share = round(float(mask.mean()), 4)
        classes.append({"name": name, "score": round(float(score), 4), "foreground": share, "objects": objects})
    return {"width": found.image.width, "height": found.image.height, "classes": classes}


def as_png(found: outputs.Found, names: Sequence[str], overlay: bool) -> bytes:
    """What `/picture` answers."""
    buffer = io.BytesIO()
    (outputs.overlay(found, names) if overlay else outputs.labels(found)).save(buffer, "PNG")
    return buffer.getvalue()


# Serve sends the class with what the module holds by then: what it calls stands before it.
def _predictor(settings: Settings, gpu: bool) -> Any:
    return checkpoints.load_predictor(checkpoints.chosen(settings.checkpoint), settings.encoder_weights, gpu)


@serve.deployment
@serve.ingress(api)
class Service:
    """A replica: encoder, segmenter and classes on one device."""

    def __init__(self, settings: Settings, classes: "tuple[ClassEncoding, ...]"):
        import torch

        torch.set_num_threads(max(1, int(settings.replica_cpus)))
        heap.keep_freed_memory()
        self.predictor = _predictor(settings, settings.gpu)
        self.predictor.check(classes)
        self.classes, self.names = classes, [one.name for one in classes]
        self.segment_batch.set_max_batch_size(settings.batch)  # type: ignore[attr-defined]

    @api.get("/")
    def list_classes(self) -> dict[str, Any]:
        """The classes that are looked for, and the digest of the segmenter that looks for them."""
        classes = [{"name": one.name, "shots": one.shots} for one in self.classes]
        return {"segmenter": self.predictor.digest, "classes": classes}

    @api.post("/segment", **DOCUMENTED)
    async def segment(self, request: Request, instances: bool = False) -> dict[str, Any]:
        """Masks as COCO has them, at the photograph's own size. `score` is the probability that it shows the class,
        `foreground` the mask's share of it; with `instances` each connected part is an object."""
        found = await self.segment_batch(await read_photograph(request))
        return await asyncio.to_thread(as_json, found, self.names, instances)

    @api.post("/picture", response_class=Response, **DOCUMENTED)
    async def picture(self, request: Request, format: Literal["labels", "overlay"] = "labels") -> Response:
        """A PNG whose values are classes from 1 on, or the photograph with its masks."""
        found = await self.segment_batch(await read_photograph(request))
        data = await asyncio.to_thread(as_png, found, self.names, format == "overlay")
        return Response(data, media_type="image/png")

    @serve.batch(batch_wait_timeout_s=BATCH_WAIT_S)
    async def segment_batch(self, images: "list[Image.Image]") -> list[outputs.Found]:
        """What each of a few photographs shows."""
        return await asyncio.to_thread(self._segment, images)

    def _segment(self, images: "list[Image.Image]") -> list[outputs.Found]:
        self.predictor.set_images(images)
        results = zip(images, self.predictor.logits(self.classes), strict=True)
        return [outputs.Found("", "", image, of.mask.numpy(), of.scores, of.lag) for image, of in results]


def application(args: dict[str, str]) -> serve.Application:
    """What a serve config names as its import path. `flags` are those of the command; host and port are the config's.

    Raises UserError.
    """
    flags = shlex.split(args.get("flags", ""))
    if any(flag.startswith(("--host", "--port")) for flag in flags):
        raise UserError("flags: --host and --port are http_options of the serve config; leave them out here")
    settings = cli.parse(Settings, flags)
    return build_application(settings, checked_classes(settings))


def build_application(settings: Settings, wanted: Sequence[Examples]) -> serve.Application:
    """The application, its classes registered. Raises UserError."""
    predictor = _predictor(settings, gpu=False)
    classes = tuple(registered(one, predictor) for one in wanted)
    predictor.check(classes)
    if (size := sum(one.nbytes for one in classes)) > MOST_CLASS_BYTES:
        raise UserError(
            f"--class: expected at most {MOST_CLASS_BYTES >> 20} MiB of classes, got {size >> 20}; register them from "
            "fewer photographs, or serve them in parts"
        )
    most = settings.most_replicas or settings.replicas
    scaling = {"min_replicas": settings.replicas, "max_replicas": most, "target_ongoing_requests": settings.batch}
    return Service.options(  # type: ignore[attr-defined, no-any-return]
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": int(settings.gpu)},
        max_ongoing_requests=2 * settings.batch,
        max_queued_requests=settings.queue,
    ).bind(settings, classes)
