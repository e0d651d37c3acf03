//! Options of a connection.

use crate::error::{guard, Error, Failure};
use crate::gate::{Gate, Notice};
use crate::pointer::{free, give, text, Data};
use crate::value::Value;
use std::ffi::{c_char, c_void};
use std::ptr;
use std::time::Duration;
use zcproto_client::{AddressOrder, ConnectOptions, Credentials, Device, Secret};

/// The function that logs in by a scheme of the server's application: it returns a map with `scheme` and its fields, which the
/// library frees, or NULL on failure.
pub type Login = Option<extern "C" fn(data: *mut c_void) -> *mut Value>;

/// How to reach and verify a server, and how to open a session there. Use it in one thread at a time.
pub struct Options {
    connect: ConnectOptions,
    user: Option<String>,
    key: Option<Secret>,
    device: Option<String>,
    device_name: Option<String>,
    login: Option<(Login, Data)>,
    on_warning: Option<(Notice, Data)>,
    on_connected: Option<(Notice, Data)>,
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
            "address_order" => connect.address_order(match value {
                "random" => AddressOrder::Random,
                "listed" => AddressOrder::Listed,
                _ => return Err(Failure::argument("address_order must be random or listed")),
            }),
            "ca_file" => connect.ca_file(value),
            "ca_pem" => connect.ca_pem(value),
            "system_store" if boolean(name, value)? => connect.system_store(),
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
            "max_connections" => connect.max_connections(number(name, value)? as usize),
            "max_frame" => connect.max_frame(number(name, value)?),
            "open_session" if !boolean(name, value)? => connect.without_session(),
            "system_store" | "open_session" => connect,
            _ => return Err(Failure::argument(&format!("there is no option {name:?}; zcproto.h lists them"))),
        })
    }

    /// Return the options with their credentials, and with their callbacks, which run until the gate is closed.
    pub(crate) fn connect(&self, gate: &Gate) -> Result<ConnectOptions, Failure> {
        let mut connect = self.connect.clone();
        if let Some(credentials) = self.credentials(gate)? {
            connect = connect.credentials(credentials);
        }
        if let Some((notice, data)) = self.on_warning {
            connect = connect.on_warning(gate.notice(notice, data));
        }
        if let Some((notice, data)) = self.on_connected {
            let notice = gate.notice(notice, data);
            connect = connect.on_connected(move |endpoint| notice(&endpoint.to_string()));
        }
        Ok(connect)
    }

    pub(crate) fn credentials(&self, gate: &Gate) -> Result<Option<Credentials>, Failure> {
        match (&self.user, &self.key, &self.device, &self.device_name, self.login) {
            (Some(user), Some(key), None, None, None) => Ok(Some(Credentials::api_key(user, key.clone()))),
            (None, None, Some(file), Some(name), None) => Ok(Some(Credentials::device(Device::load(file)?, name))),
            (None, None, None, None, Some((login, data))) => Ok(Some(login_of(gate.clone(), login, data))),
            (user, None, None, None, None) => {
                Ok(user.clone().map(|user| Credentials::Certificate { user: Some(user) }))
            }
            _ => Err(Failure::argument("give user and key, device and device_name, a login, or none of these")),
        }
    }
}

/// Return credentials that call a function for each session.
fn login_of(gate: Gate, login: Login, data: Data) -> Credentials {
    Credentials::login(move || {
        let returned = gate.run(|| login.map_or(ptr::null_mut(), |login| login(data.get())));
        let returned = returned.filter(|value| !value.is_null());
        // SAFETY: the application passes a value for the last time.
        let login = returned.map(|value| unsafe { Box::from_raw(value) }.inner().clone());
        async move { login.ok_or_else(|| "it returned NULL".into()) }
    })
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

/// Make options for the server at an address: `host`, `host:port` or `[::1]:port`; the port is 7443 by default. Several servers that
/// share their sessions are separated by commas, at most 32: when one fails or goes away, the client uses another one at once.
#[no_mangle]
pub unsafe extern "C" fn zcp_options_new(
    address: *const c_char,
    options: *mut *mut Options,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes a text.
        let connect = ConnectOptions::new(unsafe { text(address, "address") }?);
        let (user, key, device, device_name, login) = (None, None, None, None, None);
        let made = Options { connect, user, key, device, device_name, login, on_warning: None, on_connected: None };
        // SAFETY: the caller passes a place for options.
        unsafe { give(options, made) }
    })
}

/// Set an option. Values are text, numbers and times in decimal.
///
/// - `address_order`: `random` by default, or `listed` for a primary server and its backups
/// - `user`, `key`: open the session by an API key
/// - `device`, `device_name`: open the session by an enrolled device, with its key file
/// - `certificate`, `key_file`: show a client certificate; without other credentials it opens the session
/// - `ca_file`: trust the CAs of this PEM file; without any CAs and pins, those of the system
/// - `ca_pem`: trust the CAs in this text in PEM
/// - `pins`: `sha256/BASE64` of the server's key; several are separated by spaces
/// - `system_store`: `true` trusts the CAs of the system, in addition to pins
/// - `server_hostname`: the name to verify in the certificate, instead of the host
/// - `verify`: `false` trusts any server
/// - `open_session`: `false` opens no session on connect
/// - `timeout_ms`: default timeout of calls, 30,000 by default
/// - `connect_timeout_ms`: timeout of one attempt to connect, 10,000 by default
/// - `start_timeout_ms`: how long to wait for a server that is starting, 10,000 by default
/// - `client`: the application as product/version
/// - `home`: the folder of the file of hosts that require verification; `~/.zeroclaw` by default
/// - `max_calls`: how many calls from the server are handled at once, 16 by default
/// - `max_connections`: connections to a server at once, 1 by default, at most 64; a further one is made while calls wait because
///   the server allows no more of them in flight on the others
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

/// Open sessions by a scheme of the server's application. The function is called for each session that is opened, in a thread of
/// this library, until `zcp_close`, and must return soon. NULL removes it.
#[no_mangle]
pub unsafe extern "C" fn zcp_options_set_login(
    options: *mut Options,
    login: Login,
    data: *mut c_void,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes options that no other thread uses.
        let options = unsafe { options.as_mut() }.ok_or_else(|| Failure::argument("options is NULL"))?;
        options.login = login.is_some().then(|| (login, Data::new(data)));
        Ok(())
    })
}

/// Call a function with each warning, such as that a pin has no backup. It can run in the thread that connects, and in threads of
/// this library, until `zcp_close` of the last client that was connected by these options. NULL removes it.
#[no_mangle]
pub unsafe extern "C" fn zcp_options_on_warning(
    options: *mut Options,
    notice: Notice,
    data: *mut c_void,
    error: *mut *mut Error,
) -> i32 {
    // SAFETY: the caller passes options that no other thread uses.
    unsafe { set_notice(options, |options| &mut options.on_warning, notice, data, error) }
}

/// Call a function once a client has connected and opened its session, and again after each reconnect, in a thread of this library,
/// until `zcp_close`. The text says where: `a.example:7443 (192.0.2.1)`. NULL removes it.
#[no_mangle]
pub unsafe extern "C" fn zcp_options_on_connected(
    options: *mut Options,
    notice: Notice,
    data: *mut c_void,
    error: *mut *mut Error,
) -> i32 {
    // SAFETY: the caller passes options that no other thread uses.
    unsafe { set_notice(options, |options| &mut options.on_connected, notice, data, error) }
}

/// Set or remove the function for one kind of notice.
unsafe fn set_notice(
    options: *mut Options,
    field: impl FnOnce(&mut Options) -> &mut Option<(Notice, Data)>,
    notice: Notice,
    data: *mut c_void,
    error: *mut *mut Error,
) -> i32 {
    guard(error, || {
        // SAFETY: the caller passes options that no other thread uses.
        let options = unsafe { options.as_mut() }.ok_or_else(|| Failure::argument("options is NULL"))?;
        *field(options) = notice.is_some().then(|| (notice, Data::new(data)));
        Ok(())
    })
}

/// Free options. A client does not need them after it has connected.
#[no_mangle]
pub unsafe extern "C" fn zcp_options_free(options: *mut Options) {
    // SAFETY: the caller passes options for the last time.
    unsafe { free(options) }
}
