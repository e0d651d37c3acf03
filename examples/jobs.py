"""A job that goes on without its client: a durable stream keeps its results until they are read.

zcproto serve jobs:app
python jobs.py [HOST:PORT]
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import zcproto
from zcproto import App, Ended

app = App()


@app.method("count.words", durable=True)
async def count_words(texts: list[str]) -> AsyncIterator[int | Ended[int]]:
    """Yield the number of words of each text, and end with their sum."""
    total = 0
    for text in texts:
        await asyncio.sleep(0.05)  # stands for work
        count = len(text.split())
        total += count
        yield count
    yield Ended(total)


async def main(address: str = "localhost:7443") -> None:
    texts = ["to be", "or not to be", "that", "is the question"]
    async with zcproto.connect(address, user="ada", key_file="ada.key") as client:
        async with client.stream("count.words", durable=True, texts=texts) as job:
            print("first:", await job.receive())
            assert job.id is not None
            job_id, position = job.id, job.position
        print("left the job; it goes on")

        async with client.resume(job_id, after=position) as job:
            async for count in job:
                print("next:", count)
            print("total:", job.result)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
