/** Addresses of servers: `host`, `host:port`, `[::1]:7443`, and several of them. */

import { isIP } from "node:net";
import { domainToASCII } from "node:url";
import { ConfigError } from "../errors.js";
import { escapeText } from "./text.js";

export const DEFAULT_PORT = 7443;
export const MAX_ADDRESSES = 32;
const MAX_NAME = 253; // RFC 1035 section 2.3.4

/** A port and a host: an IP address, or a name in lower case with international labels as A-labels. */
export interface Address {
  readonly host: string;
  readonly port: number;
}

/** Where a client is connected: the host and port that it was given, and the IP address of the host. */
export interface Endpoint extends Address {
  readonly ip: string;
}

/** Format an endpoint as `host:port (ip)`. */
export function endpointText(endpoint: Endpoint): string {
  return endpoint.ip === endpoint.host ? addressText(endpoint) : `${addressText(endpoint)} (${endpoint.ip})`;
}

/** Format an address as `host:port`. */
export function addressText({ host, port }: Address): string {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

/** Parse a list of addresses, or a text that separates them by commas. Throws ConfigError. */
export function parseAddresses(given: string | readonly string[]): readonly [Address, ...Address[]] {
  const texts = typeof given === "string" ? given.split(",") : given;
  if (!Array.isArray(texts) || texts.some((text) => typeof text !== "string")) {
    throw new ConfigError([`the address is a string, such as "host:${DEFAULT_PORT}", or an array of these`]);
  }
  const unique = new Map(texts.map((text) => parseAddress(text.trim())).map((each) => [addressText(each), each]));
  const [first, ...others] = unique.values();
  if (first === undefined || unique.size > MAX_ADDRESSES) {
    throw new ConfigError([`addresses: ${unique.size} are given; give from 1 to ${MAX_ADDRESSES} of them`]);
  }
  return [first, ...others];
}

/** Parse an address. Throws ConfigError. */
export function parseAddress(text: string): Address {
  const shown = JSON.stringify(escapeText(text, 120));
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
  // Names may have underscores, which IDNA does not allow.
  const isAscii = /^[\x21-\x7e]*$/.test(host);
  // domainToASCII ignores characters that no name may have, such as line breaks.
  const ascii = isAscii ? host.toLowerCase() : host === escapeText(host) ? domainToASCII(host) : "";
  const name = ascii.endsWith(".") ? ascii.slice(0, -1) : ascii;
  const labels = name.split(".");
  const isName =
    name.length <= MAX_NAME &&
    labels.every((label) => /^[a-z0-9_-]{1,63}$/.test(label)) &&
    !/^\d+$/.test(labels.at(-1) as string); // otherwise "1.2.3" would be resolved as an IPv4 address
  if (!isName) {
    throw new ConfigError([`${shown}: not a host name or an IP address`]);
  }
  return name;
}
