//! Pointers that cross the border.

use crate::error::Failure;
use std::ffi::{c_char, c_void, CStr};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr;

/// Return a text of the caller.
///
/// # Safety
///
/// `pointer` is NULL, or ends with a zero byte and does not change during the call.
pub(crate) unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str, Failure> {
    // SAFETY: by the contract of this function.
    let text = unsafe { optional_text(pointer, name) }?;
    text.ok_or_else(|| Failure::argument(&format!("{name} is NULL")))
}

/// Return a text of the caller that can be NULL.
///
/// # Safety
///
/// Like [`text`].
pub(crate) unsafe fn optional_text<'a>(pointer: *const c_char, name: &str) -> Result<Option<&'a str>, Failure> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: by the contract of this function.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map(Some).map_err(|_| Failure::argument(&format!("{name} is not UTF-8")))
}

/// Return an object of the caller.
///
/// # Safety
///
/// `pointer` is NULL or an object that is not freed during the call.
pub(crate) unsafe fn object<'a, T>(pointer: *const T, name: &str) -> Result<&'a T, Failure> {
    // SAFETY: by the contract of this function.
    unsafe { pointer.as_ref() }.ok_or_else(|| Failure::argument(&format!("{name} is NULL")))
}

/// Give an object to the caller.
///
/// # Safety
///
/// `place` is NULL or a place for a pointer.
pub(crate) unsafe fn give<T>(place: *mut *mut T, object: T) -> Result<(), Failure> {
    if place.is_null() {
        return Err(Failure::argument("the place for the result is NULL"));
    }
    // SAFETY: by the contract of this function.
    unsafe { *place = Box::into_raw(Box::new(object)) };
    Ok(())
}

/// Read something of an object. Return NULL if the object is NULL, or if reading panics.
///
/// # Safety
///
/// Like [`object`].
pub(crate) unsafe fn read<T, R>(pointer: *const T, get: impl FnOnce(&T) -> *const R) -> *const R {
    // SAFETY: by the contract of this function.
    let Some(object) = (unsafe { pointer.as_ref() }) else { return ptr::null() };
    catch_unwind(AssertUnwindSafe(|| get(object))).unwrap_or(ptr::null())
}

/// Free an object.
///
/// # Safety
///
/// `pointer` is NULL or an object that was given to the caller, and is not used afterwards.
pub(crate) unsafe fn free<T>(pointer: *mut T) {
    if !pointer.is_null() {
        // SAFETY: by the contract of this function.
        let object = unsafe { Box::from_raw(pointer) };
        drop(catch_unwind(AssertUnwindSafe(|| drop(object))));
    }
}

/// What the application passes to its callbacks.
#[derive(Clone, Copy)]
pub(crate) struct Data(*mut c_void);

impl Data {
    pub(crate) fn new(data: *mut c_void) -> Self {
        Self(data)
    }

    pub(crate) fn get(self) -> *mut c_void {
        self.0
    }
}

// SAFETY: this library only hands the pointer back. The description of callbacks says that they run in another thread.
unsafe impl Send for Data {}
// SAFETY: likewise.
unsafe impl Sync for Data {}
