//! Counts what a thread allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static TOTAL: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(freed: usize, allocated: usize) {
    LIVE.set(LIVE.get().wrapping_sub(freed).wrapping_add(allocated));
    TOTAL.set(TOTAL.get().wrapping_add(allocated));
}

// SAFETY: all memory comes from `System`, with the layout that the caller gave.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(0, layout.size());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(layout.size(), 0);
        // SAFETY: `memory` came from `System` with this layout.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(layout.size(), size);
        // SAFETY: `memory` came from `System` with this layout, and the caller keeps the contract of `realloc`.
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// Return the number of bytes that this thread holds.
#[must_use]
pub fn live() -> usize {
    LIVE.get()
}

/// Run a function; return its result and the number of bytes that it allocated, those that it freed included.
pub fn allocated<T>(function: impl FnOnce() -> T) -> (T, usize) {
    let before = TOTAL.get();
    let result = function();
    (result, TOTAL.get().wrapping_sub(before))
}
