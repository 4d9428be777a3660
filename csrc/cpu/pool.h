// memlm's own threads, for a process without a host that lends its pool (memlm_set_run).
#pragma once
#include "../include/memlm.h"

namespace memlm {

// Calls task(context, i) once for each i in 0..count-1, on this thread and up to count - 1 workers,
// and returns when all are done.  Workers start when first needed, once for the whole process; it
// waits for none that is late, but takes what is left itself.
//
// One caller at a time has the workers: another one, or a task that calls this again, does its
// tasks alone.  So there are never more threads at work than the largest count, and one for each
// further caller.  A forked child starts with no workers and may call at once, whatever the
// parent's threads were doing.
void run_on_pool(int64_t count, memlm_task task, void* context);

}  // namespace memlm
