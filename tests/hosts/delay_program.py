"""A proxy that delays: `delay_program.py LISTEN_HOST TARGET_HOST TARGET_PORT DELAY_S`; prints its port.

Every chunk is written `DELAY_S` after it was read, in order, in both directions: the kernel's own means (`tc netem`) is
missing from many kernels.
"""

import asyncio
import os
import sys

CHUNK_BYTES = 65536
CHUNKS_MAX = 256  # on their way in one direction; then the sender waits


async def carry(reader, writer, delay_s):
    loop = asyncio.get_running_loop()
    line = asyncio.Queue(CHUNKS_MAX)

    async def write():
        while True:
            due, data = await line.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    writing = asyncio.create_task(write())
    try:
        while True:
            data = await reader.read(CHUNK_BYTES)
            await line.put((loop.time() + delay_s, data))
            if not data:
                break
        await writing
    except OSError:
        writing.cancel()
        writer.close()


async def main(listen, target, port, delay_s):
    async def accept(reader, writer):
        try:
            other_reader, other_writer = await asyncio.open_connection(target, port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(carry(reader, other_writer, delay_s), carry(other_reader, writer, delay_s))

    server = await asyncio.start_server(accept, listen, 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    asyncio.get_running_loop().add_reader(0, os._exit, 0)  # the end of its input is the only thing that comes there
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
