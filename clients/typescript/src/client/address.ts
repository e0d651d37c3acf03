/** Where a server is: `host`, `host:port`, `[::1]:7443`. */

import { isIP } from "node:net";
import { domainToASCII } from "node:url";
import { ConfigError } from "../errors.js";
import { printable } from "./printable.js";

export const DEFAULT_PORT = 7443;
const MAX_NAME = 253; // RFC 1035 section 2.3.4

/** A host name in lower case (an A-label where it is international) or an address, and a port. */
export interface Address {
  readonly host: string;
  readonly port: number;
}

/** As people write it. */
export function addressText({ host, port }: Address): string {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

/** The address that a text names. Throws ConfigError saying what is wrong with it. */
export function parseAddress(text: string): Address {
  const shown = JSON.stringify(printable(text, 120));
  let host: string;
  let port: string | undefined;
  const bracketed = /^\[([^\]]*)\](?::(.*))?$/s.exec(text);
  if (bracketed !== null) {
    [, host = "", port] = bracketed;
    if (isIP(host) !== 6) {
      throw new ConfigError([`${shown}: write an IPv6 address with a port as [::1]:${DEFAULT_PORT}`]);
    }
  } else if (text.split(":").length > 2) {
    if (isIP(text) !== 6) {
      throw new ConfigError([`${shown}: write HOST:PORT, or [ADDRESS]:PORT for IPv6`]);
    }
    host = text;
  } else {
    [host = "", port] = text.split(":");
  }
  const number = port === undefined ? DEFAULT_PORT : /^\d{1,5}$/.test(port) ? Number(port) : 0;
  if (number < 1 || number > 65_535) {
    throw new ConfigError([`${shown}: the port must be a number from 1 to 65535`]);
  }
  return { host: hostOf(host, shown), port: number };
}

function hostOf(host: string, shown: string): string {
  if (isIP(host)) {
    return host.toLowerCase();
  }
  // The underscore is no part of IDNA, and of names all the same.
  const isAscii = /^[\x21-\x7e]*$/.test(host);
  // domainToASCII passes over what is no character of a name at all, such as ends of lines.
  const ascii = isAscii ? host.toLowerCase() : host === printable(host) ? domainToASCII(host) : "";
  const name = ascii.endsWith(".") ? ascii.slice(0, -1) : ascii;
  const labels = name.split(".");
  const isName =
    name.length <= MAX_NAME &&
    labels.every((label) => /^[a-z0-9_-]{1,63}$/.test(label)) &&
    !/^\d+$/.test(labels.at(-1) as string); // else "1.2.3" would be resolved as an address that no one meant
  if (!isName) {
    throw new ConfigError([`${shown}: no host name or address`]);
  }
  return name;
}
