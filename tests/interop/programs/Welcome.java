import java.io.FileInputStream;
import java.io.InputStream;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLException;
import javax.net.ssl.SSLParameters;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;

/**
 * Connects with Java's JSSE and prints the first bytes of the server's first frame.
 *
 * <pre>java Welcome.java PORT NAME [CA_FILE]</pre>
 *
 * Without a CA file it trusts the authorities of the Java installation. Exit code 3: the handshake failed.
 */
public final class Welcome {
    private static final int HEADER_BYTES = 8;
    private static final int TIMEOUT_MS = 900_000;
    private static final int REFUSED = 3;

    private Welcome() {}

    public static void main(String[] arguments) throws Exception {
        int port = Integer.parseInt(arguments[0]);
        String name = arguments[1];
        SSLContext context = context(arguments.length > 2 ? arguments[2] : null);
        try (Socket raw = new Socket()) {
            raw.connect(new InetSocketAddress("127.0.0.1", port), TIMEOUT_MS);
            raw.setSoTimeout(TIMEOUT_MS);
            try (SSLSocket connection =
                    (SSLSocket) context.getSocketFactory().createSocket(raw, name, port, true)) {
                SSLParameters parameters = connection.getSSLParameters();
                parameters.setProtocols(new String[] {"TLSv1.3"});
                parameters.setApplicationProtocols(new String[] {"zcp/1"});
                parameters.setEndpointIdentificationAlgorithm("HTTPS"); // otherwise the name is not checked
                connection.setSSLParameters(parameters);
                handshake(connection);
                if (!"zcp/1".equals(connection.getApplicationProtocol())) {
                    throw new IllegalStateException("agreed on " + connection.getApplicationProtocol());
                }
                byte[] header = connection.getInputStream().readNBytes(HEADER_BYTES);
                System.out.write(header, 0, header.length);
                System.out.flush();
            }
        }
    }

    private static void handshake(SSLSocket connection) throws Exception {
        try {
            connection.startHandshake();
        } catch (SSLException error) {
            System.err.println(error);
            System.exit(REFUSED);
        }
    }

    private static SSLContext context(String caFile) throws Exception {
        KeyStore store = null; // the default of the installation
        if (caFile != null) {
            store = KeyStore.getInstance(KeyStore.getDefaultType());
            store.load(null, null);
            try (InputStream file = new FileInputStream(caFile)) {
                store.setCertificateEntry(
                        "ca", CertificateFactory.getInstance("X.509").generateCertificate(file));
            }
        }
        TrustManagerFactory trust =
                TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        trust.init(store);
        SSLContext context = SSLContext.getInstance("TLSv1.3");
        context.init(null, trust.getTrustManagers(), null);
        return context;
    }
}
