//! Options of a connection.

use crate::error::{guard, Error, Failure};
use crate::pointer::{free, give, text};
use std::ffi::c_char;
use std::time::Duration;
use zcproto_client::{ConnectOptions, Credentials, Device, Secret};

/// How to reach and verify a server, and how to open a session there. Use it in one thread at a time.
pub struct Options {
    connect: ConnectOptions,
    user: Option<String>,
    key: Option<Secret>,
    device: Option<String>,
    device_name: Option<String>,
}

impl Options {
    fn set(&mut self, name: &str, value: &str) -> Result<(), Failure> {
        match name {
            "user" => self.user = Some(value.into()),
            "key" => self.key = Some(value.into()),
            "device" => self.device = Some(value.into()),
            "device_name" => self.device_name = Some(value.into()),
            _ => self.connect = self.with(name, value)?,
        }
        Ok(())
    }

    fn with(&self, name: &str, value: &str) -> Result<ConnectOptions, Failure> {
        let connect = self.connect.clone();
        Ok(match name {
            "ca_file" => connect.ca_file(value),
            "pins" => connect.pins(value.split_ascii_whitespace()),
            "verify" => connect.verify(boolean(name, value)?),
            "server_hostname" => connect.server_hostname(value),
            "certificate" => connect.certificate(value),
            "key_file" => connect.key_file(value),
            "key_log" => connect.key_log(value),
            "home" => connect.home(value),
            "client" => connect.client(value),
            "timeout_ms" => connect.timeout(duration(name, value)?),
            "connect_timeout_ms" => connect.connect_timeout(duration(name, value)?),
            "start_timeout_ms" => connect.start_timeout(duration(name, value)?),
            "max_calls" => connect.max_calls(number(name, value)?),
            "max_frame" => connect.max_frame(number(name, value)?),
            "open_session" if !boolean(name, value)? => connect.without_session(),
            "open_session" => connect,
            _ => return Err(Failure::argument(&format!("there is no option {name:?}; zcproto.h lists them"))),
        })
    }

    /// Return the options with their credentials.
    pub(crate) fn connect(&self) -> Result<ConnectOptions, Failure> {
        let connect = self.connect.clone();
        Ok(match self.credentials()? {
            Some(credentials) => connect.credentials(credentials),
            None => connect,
        })
    }

    pub(crate) fn credentials(&self) -> Result<Option<Credentials>, Failure> {
        match (&self.user, &self.key, &self.device, &self.device_name) {
            (Some(user), Some(key), None, None) => Ok(Some(Credentials::api_key(user, key.clone()))),
            (None, None, Some(file), Some(name)) => Ok(Some(Credentials::device(Device::load(file)?, name))),
            (user, None, None, None) => Ok(user.clone().map(|user| Credentials::Certificate { user: Some(user) })),
            _ => Err(Failure::argument("give user and key, device and device_name, or none of these")),
        }
    }
}

fn boolean(name: &str, value: &str) -> Result<bool, Failure> {
    value.parse().map_err(|_| Failure::argument(&format!("{name} must be true or false")))
}

fn number(name: &str, value: &str) -> Result<u32, Failure> {
    value.parse().map_err(|_| Failure::argument(&format!("{name} must be a number")))
}

fn duration(name: &str, value: &str) -> Result<Duration, Failure> {
    number(name, value).map(|number| Duration::from_millis(number.into()))
}

/// Make options for the server at an address: `host`, `host:port` or `[::1]:port`; the port is 7443 by default.
#[no_mangle]
pub unsafe extern "C" fn zcp_options_new(
    address: *const c_char,
    options: *mut *mut Options,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a text.
        let connect = ConnectOptions::new(unsafe { text(address, "address") }?);
        let made = Options { connect, user: None, key: None, device: None, device_name: None };
        // SAFETY: the caller passes a place for options.
        unsafe { give(options, made) }
    })
}

/// Set an option. Values are text, numbers and times in decimal.
///
/// - `user`, `key`: open the session by an API key
/// - `device`, `device_name`: open the session by an enrolled device, with its key file
/// - `certificate`, `key_file`: show a client certificate; without other credentials it opens the session
/// - `ca_file`: trust the CAs of this PEM file; without it and without `pins`, those of the system
/// - `pins`: `sha256/BASE64` of the server's key; several are separated by spaces
/// - `server_hostname`: the name to verify in the certificate, instead of the host
/// - `verify`: `false` trusts any server
/// - `open_session`: `false` opens no session on connect
/// - `timeout_ms`: default timeout of calls, 30,000 by default
/// - `connect_timeout_ms`: timeout of one attempt to connect, 10,000 by default
/// - `start_timeout_ms`: how long to wait for a server that is starting, 10,000 by default
/// - `client`: the application as product/version
/// - `home`: the folder of the file of hosts that require verification; `~/.zeroclaw` by default
/// - `max_calls`: how many calls from the server are handled at once, 16 by default
/// - `max_frame`: the largest frame accepted from the server, 1,048,576 bytes by default
/// - `key_log`: append the secrets of TLS to this file, for debugging
#[no_mangle]
pub unsafe extern "C" fn zcp_options_set(
    options: *mut Options,
    name: *const c_char,
    value: *const c_char,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes options that no other thread uses, and texts.
        let (options, name, value) = unsafe { (options.as_mut(), text(name, "name")?, text(value, "value")?) };
        options.ok_or_else(|| Failure::argument("options is NULL"))?.set(name, value)
    })
}

/// Free options. A client does not need them after it has connected.
#[no_mangle]
pub unsafe extern "C" fn zcp_options_free(options: *mut Options) {
    // SAFETY: the caller passes options for the last time.
    unsafe { free(options) }
}
