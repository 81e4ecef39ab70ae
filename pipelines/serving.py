"""The service that `serve` starts, as a Ray Serve application: photographs in by HTTP, masks out.

Photographs that come at the same time go through the encoder in one batch.
"""

import asyncio
import io
import shlex
import socket
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from ray import serve

from fsdino.errors import UserError, first_line
from fsdino.preprocess import image_of
from pipelines import checkpoints, cli, outputs
from pipelines.examples import read_classes, registered
from pipelines.serve import Settings

if TYPE_CHECKING:
    from PIL import Image

    from fsdino.predictor import ClassEncoding

MOST_BYTES = 64 * 2**20
BATCH_WAIT_S = 0.005
BODY = "the request's body"
PHOTOGRAPH = {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}, "required": True}
IN_DOCS = {"requestBody": PHOTOGRAPH}

api = FastAPI(title="FS-DINO", description="Masks of registered classes, in photographs that are sent.")


@api.exception_handler(UserError)
def refused(request: Request, error: UserError) -> JSONResponse:
    """What is wrong with a photograph, in one line."""
    return JSONResponse({"error": first_line(error)}, 400)


def _answer(found: outputs.Found, names: list[str], instances: bool) -> dict[str, Any]:
    classes = []
    for name, score, mask, logits in zip(names, found.scores, found.masks, found.logits, strict=True):
        objects = [outputs.coco_record(*part, logits) for part in outputs.parts(mask, instances)]
        share = round(float(mask.mean()), 4)
        classes.append({"name": name, "score": round(float(score), 4), "foreground": share, "objects": objects})
    return {"width": found.image.width, "height": found.image.height, "classes": classes}


def _drawn(found: outputs.Found, names: list[str], overlay: bool) -> bytes:
    buffer = io.BytesIO()
    (outputs.overlay(found, names) if overlay else outputs.labels(found)).save(buffer, "PNG")
    return buffer.getvalue()


@serve.deployment
@serve.ingress(api)
class Service:
    """A replica: encoder, segmenter and classes on one device."""

    def __init__(self, settings: Settings, classes: "tuple[ClassEncoding, ...]"):
        import torch

        torch.set_num_threads(max(1, int(settings.replica_cpus)))
        checkpoint = checkpoints.chosen(settings.checkpoint)
        self.predictor = checkpoints.load_predictor(checkpoint, settings.encoder_weights, settings.gpu)
        self.predictor.check(classes)
        self.classes = classes
        self.find.set_max_batch_size(settings.batch)  # type: ignore[attr-defined]

    @api.get("/")
    def known(self) -> dict[str, Any]:
        """The classes that are looked for, and the digest of the segmenter that looks for them."""
        classes = [{"name": one.name, "shots": one.shots} for one in self.classes]
        return {"segmenter": self.predictor.digest, "host": socket.gethostname(), "classes": classes}

    @api.post("/segment", openapi_extra=IN_DOCS)
    async def segment(self, request: Request, instances: bool = False) -> dict[str, Any]:
        """Masks of a photograph (the request's body) as COCO has them, at its own size; `score` is the probability that
        it shows the class, `foreground` the mask's share of it."""
        found = await self.found(request)
        return await asyncio.to_thread(_answer, found, [one.name for one in self.classes], instances)

    @api.post("/picture", openapi_extra=IN_DOCS, response_class=Response)
    async def picture(self, request: Request, format: Literal["labels", "overlay"] = "labels") -> Response:
        """The same as a PNG whose values are classes from 1 on, or as the photograph with its masks."""
        found = await self.found(request)
        data = await asyncio.to_thread(_drawn, found, [one.name for one in self.classes], format == "overlay")
        return Response(data, media_type="image/png")

    async def found(self, request: Request) -> outputs.Found:
        """What the photograph shows. Raises UserError if it is none, or too large."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BYTES:
                raise UserError(f"{BODY}: expected a photograph of at most {MOST_BYTES >> 20} MiB, got more")
        image = await asyncio.to_thread(image_of, bytes(body), BODY)
        return await self.find(image)

    @serve.batch(batch_wait_timeout_s=BATCH_WAIT_S)
    async def find(self, images: "list[Image.Image]") -> list[outputs.Found]:
        """What each of a few photographs shows."""
        return await asyncio.to_thread(self._find, images)

    def _find(self, images: "list[Image.Image]") -> list[outputs.Found]:
        self.predictor.set_images(images)
        found = zip(images, self.predictor.logits(self.classes), strict=True)
        return [outputs.Found("", "", image, of.mask.numpy(), of.scores, of.lag) for image, of in found]


def application(args: dict[str, str]) -> serve.Application:
    """What a serve config names as its import path; its argument `flags` is the command's own line, without host and
    port. Raises UserError."""
    return built(cli.parse(Settings, shlex.split(args["flags"])))


def built(settings: Settings) -> serve.Application:
    """The application, its classes registered. Raises UserError."""
    wanted = read_classes(settings.classes, settings.mask_value)
    predictor = checkpoints.load_predictor(checkpoints.chosen(settings.checkpoint), settings.encoder_weights)
    classes = tuple(registered(one, predictor) for one in wanted)
    predictor.check(classes)
    most = settings.most_replicas or settings.replicas
    scaling = {"min_replicas": settings.replicas, "max_replicas": most, "target_ongoing_requests": settings.batch}
    return Service.options(  # type: ignore[attr-defined, no-any-return]
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": int(settings.gpu)},
        max_ongoing_requests=2 * settings.batch,
        max_queued_requests=settings.queue,
    ).bind(settings, classes)
