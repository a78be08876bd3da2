"""vLLM engines in Ray actors: how stages lease them, sample on them, and give them new weights while they sample.

rollouter.py turns.py     how a rollout is made, turn by turn; one turn, and other work that a rollout waits for
running.py                all rollouts that are being made
workers.py groups.py      send turns to engines and replace lost ones; the same for callers that train nothing
worker.py worker_weights.py   one engine's place and its requests; which weights each has, and how it takes newer ones
joining.py                workers that join and leave while the others sample
requests.py rollouts.py   requests and answers; the one place where answers become rollouts
packed.py                 many requests or answers on their way to another process
client.py registry.py     the engines that a stage leases; the actor that makes them and keeps them warm
engine.py stream.py       the engine; the replies that are on their way out of it, in pieces
core.py arguments.py      vLLM's engine core: started, watched, asked with a deadline; what it is started with
vllm_requests.py          a request as vLLM takes it, its output as a completion
loads.py                   how many replies each engine samples at a time, and how fast, as events
watch.py progress.py      whether the engine's core process is alive, and what its vLLM worker is doing
start_failure.py kv_memory.py   why an engine did not start; the size of its KV cache on a CPU
cpu_attention.py          which models vLLM's attention on a CPU cannot compute
manifests.py weights.py transfer.py   where weights are; through shared memory; from GPU to GPU
segments.py               how the ranks of a trainer write their parts of the weights into one segment
vllm_extension.py vllm_scheduler.py   our code that runs inside vLLM's processes
"""
