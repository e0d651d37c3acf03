/** Measures calls per second and CPU per call of this process, at each number of concurrent calls. */

export const DEPTHS = [1, 16];

export interface Figure {
  readonly depth: number;
  readonly callsPerSecond: number;
  readonly cpuMicroseconds: number;
}

export async function measure(call: (number: number) => Promise<unknown>, calls: number): Promise<Figure[]> {
  const figures: Figure[] = [];
  for (const depth of DEPTHS) {
    await run(call, Math.ceil(calls / 2), depth); // warm up the compiler
    const began = performance.now();
    const cpu = process.cpuUsage();
    const done = await run(call, calls, depth);
    const { user, system } = process.cpuUsage(cpu);
    const seconds = (performance.now() - began) / 1000;
    figures.push({ depth, callsPerSecond: done / seconds, cpuMicroseconds: (user + system) / done });
  }
  return figures;
}

async function run(call: (number: number) => Promise<unknown>, calls: number, depth: number): Promise<number> {
  let done = 0;
  const worker = async () => {
    while (done < calls) {
      done += 1;
      await call(done);
    }
  };
  await Promise.all(Array.from({ length: depth }, worker));
  return done;
}
