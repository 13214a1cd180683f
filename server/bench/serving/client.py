"""A client process of `rudder bench load`: reads a job from standard input, and writes what it recorded.

python -m rudder.server.bench.serving.client < JOB
"""

import asyncio
import json
import random
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count

import msgspec

from rudder.server.bench.serving.offered import PROGRAMS, Job, Recorded, Request

# One message of an answer, whatever it holds; a request is the stream of its messages.
Send = Callable[[int], AsyncIterator[object]]


def main() -> None:
    """Do one job."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(record(job))))


async def record(job: Job) -> Recorded:
    """Offer the load of a job and record it."""
    send, close = await CLIENTS[job.protocol](job)
    cpu, begin = time.process_time(), time.perf_counter()
    requests = await (open_loop(job, send, begin) if job.rate else closed_loop(job, send, begin))
    seconds = time.perf_counter() - begin
    used = time.process_time() - cpu
    await close()
    return Recorded(requests, seconds, used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


async def closed_loop(job: Job, send: Send, begin: float) -> list[Request]:
    """Keep `streams` requests in flight, each followed by the next of its stream."""
    numbers = count()

    async def stream() -> list[Request]:
        return [await answer(send(next(numbers)), begin, time.perf_counter()) for _ in range(job.requests)]

    return [request for part in await asyncio.gather(*(stream() for _ in range(job.streams))) for request in part]


async def open_loop(job: Job, send: Send, begin: float) -> list[Request]:
    """Send requests at random times that no answer delays."""
    draw = random.Random(job.seed)
    due = begin
    sent = list[asyncio.Task[Request]]()
    for number in range(job.streams * job.requests):
        due += draw.expovariate(job.rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        sent.append(asyncio.create_task(answer(send(number), begin, due)))
    return await asyncio.gather(*sent)


async def answer(messages: AsyncIterator[object], begin: float, due: float) -> Request:
    """Read an answer to its end."""
    times = [time.perf_counter() - due async for _ in messages]
    return Request(due - begin, times)


def prompt(job: Job, number: int) -> list[int]:
    """Return a prompt that shares no prefix with others of the run: BOS and tokens drawn from the job's seed."""
    draw = random.Random(job.seed * 1_000_003 + number)
    return [1, *(draw.randrange(2, 8000) for _ in range(job.prompt_tokens - 1))]


async def openai(job: Job) -> tuple[Send, Callable[[], Awaitable[None]]]:
    """Connect to a server of the OpenAI API: completions as server-sent events."""
    import aiohttp

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), raise_for_status=True
    )

    async def send(number: int) -> AsyncIterator[object]:
        body = {
            "model": job.model, "prompt": prompt(job, number), "max_tokens": job.new_tokens, "temperature": 0.0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        async with session.post(f"http://{job.address}/v1/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    return send, session.close


async def smg(job: Job) -> tuple[Send, Callable[[], Awaitable[None]]]:
    """Connect to vLLM's own gRPC server, which returns token ids."""
    import grpc
    from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc

    channel = grpc.aio.insecure_channel(job.address)
    stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
    sampling = vllm_engine_pb2.SamplingParams(
        temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_tokens=job.new_tokens, ignore_eos=True, n=1,
        skip_special_tokens=True,
    )  # fmt: skip

    async def send(number: int) -> AsyncIterator[object]:
        request = vllm_engine_pb2.GenerateRequest(
            request_id=f"{job.seed}-{number}", stream=True, sampling_params=sampling,
            tokenized=vllm_engine_pb2.TokenizedInput(input_ids=prompt(job, number)),
        )  # fmt: skip
        async for message in stub.Generate(request):
            if message.WhichOneof("response") == "chunk":
                yield message

    return send, channel.close


async def rudder(job: Job) -> tuple[Send, Callable[[], Awaitable[None]]]:
    """Connect to Rudder with its Python client."""
    from rudder_client import AsyncClient, Feature, Program

    client = AsyncClient(job.address)
    kinds = {"none": 0, "one": 1, "many": PROGRAMS}[job.programs]
    programs = [Program().at(job.site).clamp(Feature(3 * number + 1), to=-1.0) for number in range(kinds)]

    async def send(number: int) -> AsyncIterator[object]:
        steer = programs[number % kinds] if programs else None
        async for chunk in client.generate(
            prompt(job, number), steer=steer, temperature=0.0, max_tokens=job.new_tokens, ignore_eos=True
        ):
            yield chunk

    return send, client.close


CLIENTS = {"openai": openai, "smg": smg, "rudder": rudder}

if __name__ == "__main__":
    main()
