/**
 * Devices: Ed25519 key pairs in files, which open sessions without a shared secret.
 *
 * The file is PKCS#8 in PEM without a passphrase. It is created with mode 0600, and refused if others can read it. The private
 * key never leaves this object and is hidden from inspection and messages.
 */

import { createPrivateKey, createPublicKey, generateKeyPairSync, type KeyObject, sign } from "node:crypto";
import { inspect } from "node:util";
import { readPrivate, unusable, writePrivate } from "./private_file.js";

// PKCS#8 of an Ed25519 key, up to the 32 bytes of its seed (RFC 8410 section 7).
const SEED_PREFIX = Buffer.from("302e020100300506032b657004220420", "hex");
const SEED_SIZE = 32;

/**
 * The key of a device. Create it once with `create`, and read it with `load` from then on.
 *
 *     const device = await Device.create("laptop.key");
 *     await enroll("host:7443", code, device, "laptop", { caFile: "ca.crt" });
 */
export class Device {
  /** The public key of 32 bytes, which identifies the device. */
  readonly publicKey: Uint8Array;
  readonly #key: KeyObject;

  private constructor(key: KeyObject) {
    this.#key = key;
    const { x } = createPublicKey(key).export({ format: "jwk" });
    this.publicKey = new Uint8Array(Buffer.from(x as string, "base64url"));
  }

  [inspect.custom](): string {
    return `Device(${Buffer.from(this.publicKey).toString("hex")})`;
  }

  /** Create a device and write its key to a new file of mode 0600. Rejects with CertificateError. */
  static async create(path: string): Promise<Device> {
    const { privateKey } = generateKeyPairSync("ed25519");
    await writePrivate(path, privateKey.export({ type: "pkcs8", format: "pem" }) as string);
    return new Device(privateKey);
  }

  /** Read the key of a device from a file. Rejects with CertificateError. */
  static async load(path: string): Promise<Device> {
    const pem = await readPrivate(path);
    if (pem.includes("ENCRYPTED")) {
      throw unusable(path, "is encrypted; the key of a device must not have a passphrase");
    }
    let key: KeyObject;
    try {
      key = createPrivateKey({ key: pem, format: "pem" });
    } catch (error) {
      throw unusable(path, "is not a private key in PEM; create one with Device.create", error);
    }
    if (key.asymmetricKeyType !== "ed25519") {
      throw unusable(path, "is not an Ed25519 key; create one with Device.create");
    }
    return new Device(key);
  }

  /** Make a device from the 32 bytes of a private key (RFC 8032), for keys that are not in files. */
  static fromSeed(seed: Uint8Array): Device {
    if (seed.length !== SEED_SIZE) {
      throw new RangeError(`the private key of a device must have ${SEED_SIZE} bytes`);
    }
    const key = Buffer.concat([SEED_PREFIX, seed]);
    return new Device(createPrivateKey({ key, format: "der", type: "pkcs8" }));
  }

  /** Return the signature of 64 bytes (RFC 8032). */
  sign(message: Uint8Array): Uint8Array {
    return sign(null, message, this.#key);
  }
}
