//! Devices and their enrolment.

use crate::error::{guard, Error};
use crate::gate::Gate;
use crate::options::Options;
use crate::pointer::{give, object, text};
use crate::runtime::Shared;
use crate::value::Value;
use std::ffi::c_char;
use zcproto_client::Device;

/// Create the key of a device in a new file, which only its owner can read.
#[no_mangle]
pub unsafe extern "C" fn zcp_device_create(file: *const c_char, error: *mut *mut Error) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a text.
        Device::create(unsafe { text(file, "file") }?)?;
        Ok(())
    })
}

/// Enrol a device with a code of `zcproto pair`, under a name. The options need no credentials. `user` gets the name of the
/// user to whom the device belongs from now on. Waits for that.
#[no_mangle]
pub unsafe extern "C" fn zcp_enroll(
    options: *const Options,
    code: *const c_char,
    file: *const c_char,
    name: *const c_char,
    user: *mut *mut Value,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes options that no other thread uses, and texts.
        let (options, code, file, name) =
            unsafe { (object(options, "options")?, text(code, "code")?, text(file, "file")?, text(name, "name")?) };
        let device = Device::load(file)?;
        let runtime = Shared::get()?;
        let gate = Gate::default();
        let enrolled = runtime.wait(zcproto_client::enroll(options.connect(&gate)?, code, &device, name));
        gate.close();
        let found = enrolled??;
        // SAFETY: the caller passes a place for a value.
        unsafe { give(user, Value::new(found.into())) }
    })
}
