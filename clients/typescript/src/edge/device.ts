/**
 * A device: a key pair of Ed25519 in a file, by which sessions are opened without any shared secret.
 *
 * The file is PKCS#8 in PEM without a passphrase, new, and its owner's alone; one that others can read is refused. The
 * key signs and never leaves this object: it is in no inspection and in no message.
 */

import { createPrivateKey, createPublicKey, generateKeyPairSync, type KeyObject, sign } from "node:crypto";
import { inspect } from "node:util";
import { readPrivate, unusable, writePrivate } from "./private_file.js";

// PKCS#8 of an Ed25519 key, up to the 32 bytes of its seed (RFC 8410 section 7).
const SEED_PREFIX = Buffer.from("302e020100300506032b657004220420", "hex");
const SEED_SIZE = 32;

/**
 * A device's key. Make one with `create`, once, and take it with `load` from then on.
 *
 *     const device = await Device.create("laptop.key");
 *     await enroll("host:7443", code, device, "laptop", { caFile: "ca.crt" });
 */
export class Device {
  /** The 32 bytes that servers know it by. */
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

  /** A new device, with its key in a new file of mode 0600. Rejects with CertificateError if that cannot be made. */
  static async create(path: string): Promise<Device> {
    const { privateKey } = generateKeyPairSync("ed25519");
    await writePrivate(path, privateKey.export({ type: "pkcs8", format: "pem" }) as string);
    return new Device(privateKey);
  }

  /** The device whose key is in a file. Rejects with CertificateError if that cannot be used, and says why. */
  static async load(path: string): Promise<Device> {
    const pem = await readPrivate(path);
    if (pem.includes("ENCRYPTED")) {
      throw unusable(path, "is encrypted; a device's key has no passphrase");
    }
    let key: KeyObject;
    try {
      key = createPrivateKey({ key: pem, format: "pem" });
    } catch (error) {
      throw unusable(path, "is no private key in PEM; make one by Device.create", error);
    }
    if (key.asymmetricKeyType !== "ed25519") {
      throw unusable(path, "is a key of another kind than Ed25519; make one by Device.create");
    }
    return new Device(key);
  }

  /** The device with the 32 bytes of a private key (RFC 8032), for keys that are kept elsewhere than in files. */
  static fromSeed(seed: Uint8Array): Device {
    if (seed.length !== SEED_SIZE) {
      throw new RangeError(`the private key of a device has ${SEED_SIZE} bytes`);
    }
    const key = Buffer.concat([SEED_PREFIX, seed]);
    return new Device(createPrivateKey({ key, format: "der", type: "pkcs8" }));
  }

  /** The 64 bytes of a signature (RFC 8032). */
  sign(message: Uint8Array): Uint8Array {
    return sign(null, message, this.#key);
  }
}
