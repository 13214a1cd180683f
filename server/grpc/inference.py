"""InferenceService: generation, whole or as a stream, and the features of a given text."""

from rudder.server.service.generation import Job, prepare, run
from rudder.server.service.prompt import token_texts
from rudder.server.service.serving import REQUEST_ID, Context, Serving, fitting, send
from rudder.v1 import inference_pb2, inference_pb2_grpc


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """The contract's methods over a running engine."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        """Deltas as they come. Nothing is sent before the first token, so that the call can be tried elsewhere."""
        job = await prepared(self.serving, request, context)
        request_id = REQUEST_ID.get()

        async def emit(delta: inference_pb2.ChoiceDelta) -> None:
            nonlocal request_id
            message = inference_pb2.GenerateResponse(request_id=request_id, features=job.names.take(), choices=[delta])
            request_id = ""
            await send(context, message, self.serving.config.limits)

        await run(self.serving, job, emit)

    async def Complete(
        self, request: inference_pb2.CompleteRequest, context: Context
    ) -> inference_pb2.CompleteResponse:
        """The same choices in one message."""
        job = await prepared(self.serving, request, context)
        choices = await whole_choices(self.serving, job)
        response = inference_pb2.CompleteResponse(
            request_id=REQUEST_ID.get(), features=job.names.take(), choices=map(as_choice, choices)
        )
        return fitting(response, self.serving.config.limits)

    async def Inspect(self, request: inference_pb2.InspectRequest, context: Context) -> inference_pb2.InspectResponse:
        """One token is generated, so that the engine reads the whole prompt, and thrown away."""
        job = await prepared(self.serving, request, context)
        (choice,) = await whole_choices(self.serving, job)
        ids = job.calls[0].prompt_ids
        tokenizer = self.serving.engine.tokenizer
        response = inference_pb2.InspectResponse(
            request_id=REQUEST_ID.get(),
            features=job.names.take(),
            token_ids=ids,
            token_texts=await self.serving.in_tokenizer_thread(lambda: token_texts(ids, tokenizer)),
            activations=choice.activations,
            pooled=choice.pooled,
            attestation=choice.attestation,
        )
        return fitting(response, self.serving.config.limits)


async def prepared(
    serving: Serving,
    request: inference_pb2.GenerateRequest | inference_pb2.CompleteRequest | inference_pb2.InspectRequest,
    context: Context,
) -> Job:
    """The job of a request, its identity in the trailers."""
    job = await prepare(serving, request)
    context.set_trailing_metadata((("rudder-request-id", REQUEST_ID.get()), ("rudder-program-digest", job.digest)))
    return job


async def whole_choices(serving: Serving, job: Job) -> list[inference_pb2.ChoiceDelta]:
    """Each choice's deltas as one."""
    wholes = [inference_pb2.ChoiceDelta(index=i) for i in range(len(job.calls))]

    async def emit(delta: inference_pb2.ChoiceDelta) -> None:
        whole = wholes[delta.index]
        text = whole.text + delta.text
        whole.MergeFrom(delta)
        whole.text = text

    await run(serving, job, emit)
    return wholes


def as_choice(whole: inference_pb2.ChoiceDelta) -> inference_pb2.Choice:
    """A choice has the fields of its deltas, by the same numbers."""
    return inference_pb2.Choice.FromString(whole.SerializeToString())
